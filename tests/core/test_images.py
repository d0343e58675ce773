"""Any picture a user has, made RGB; sizes; refusals."""

import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

from unipic_jax.core import images
from unipic_jax.core.errors import InputError

COLOUR = (200, 30, 90)


@pytest.fixture
def save(tmp_path):
    def save(picture, name="a.png", **kw):
        picture.save(tmp_path / name, **kw)
        return tmp_path / name
    return save


def pixel(path, at=(0, 0)):
    picture = images.open_picture(path)
    assert picture.mode == "RGB"
    return picture.getpixel(at)


def test_transparency_lies_over_white(save):
    half = Image.new("RGBA", (4, 4), (*COLOUR, 255))
    half.putpixel((1, 0), (*COLOUR, 0))
    path = save(half)
    assert pixel(path) == COLOUR
    assert pixel(path, (1, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([*COLOUR, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    path = save(palette, transparency=1)
    assert (pixel(path), pixel(path, (1, 0))) == (COLOUR, (255, 255, 255))
    assert pixel(save(Image.new("LA", (1, 1), (60, 0)))) == (255, 255, 255)


def test_greyscale_and_cmyk(save):
    assert pixel(save(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(save(Image.fromarray(np.full((2, 2), 77 * 257, np.uint16)))) == (77, 77, 77)
    assert pixel(save(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert max(pixel(save(Image.new("CMYK", (8, 8), (255, 255, 255, 255)), "a.jpg"))) < 10


def test_exif_rotation_is_applied(save):
    picture = Image.new("RGB", (6, 4))
    picture.putpixel((0, 0), COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    opened = images.open_picture(save(picture, exif=exif))
    assert opened.size == (4, 6)
    assert opened.getpixel((3, 0)) == COLOUR


@pytest.mark.parametrize(("size", "at", "want"), [  # the release's rule, from its own results
    ((1024, 768), 512, (512, 384)), ((1920, 1080), 512, (512, 288)),
    ((640, 427), 512, (512, 352)), ((3000, 1000), 512, (512, 160)),
    ((800, 375), 512, (512, 256)), ((1024, 416), 512, (512, 192)),
    ((768, 1024), 512, (384, 512)), ((500, 500), 528, (528, 512))])  # ties go to even
def test_edit_size(size, at, want):
    assert images.edit_size(*size, at) == want


def test_a_resized_source_equals_golden(golden):
    source = images.open_picture(GOLDENS / "source.png")
    resized = np.asarray(source.resize(images.edit_size(*source.size, 128)))
    assert np.array_equal(resized, golden["edit/resized"])


def test_arrays_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    x = images.to_array(Image.fromarray(levels))
    assert x.min() == -1
    assert x.max() == 1
    assert np.array_equal(np.asarray(images.to_picture(x * 0.5 + 0.5)), levels)


def test_refusals(tmp_path, save):
    noise = save(Image.effect_noise((64, 64), 9), "b.png").read_bytes()
    for make, message in (
            (lambda p: None, "is missing"),
            (lambda p: p.write_bytes(b"not a picture"), "cannot be read as a picture"),
            (lambda p: p.write_bytes(noise[:900]), "cannot be read as a picture"),
            (lambda p: Image.new("1", (20000, 20000)).save(p), "enormous|smaller than 134")):
        path = tmp_path / "x.png"
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(InputError, match=message):
            images.open_picture(path)
    with pytest.raises(InputError, match="too narrow"):
        images.edit_size(4000, 100, 512)
    with pytest.raises(InputError, match="height 500 is not a multiple of 16; use 496 or 512"):
        images.check_size("height", 500, 16)
    with pytest.raises(InputError, match="not a multiple"):
        images.check_size("height", 0, 16)
    with pytest.raises(InputError, match="is not a kind of picture"):
        images.check_output(tmp_path / "a.xyz")
    with pytest.raises(InputError, match="is not a folder"):
        images.check_output(tmp_path / "no" / "a.png")
