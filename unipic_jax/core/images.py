"""Pictures in and out: files, sizes, arrays."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from unipic_jax.core.errors import InputError
from unipic_jax.core.files import check_writable, new_file

MAX_PIXELS = 2**27  # 134 megapixels, 400 MB as RGB


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as RGB, upright as its EXIF says, transparent parts over white.

    Palettes, greyscale (8 and 16 bit) and CMYK are converted. Raises InputError where the file
    is missing, is not a picture, is truncated, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(f"{path} has {picture.width}x{picture.height} pixels; make it "
                                 f"smaller than {MAX_PIXELS // 10**6} megapixels")
            picture.load()
            picture = ImageOps.exif_transpose(picture)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} is enormous; make it smaller than {MAX_PIXELS // 10**6} "
                         "megapixels") from None
    except Exception as e:  # PIL's decoders raise many kinds for a broken file
        raise InputError(f"{path} cannot be read as a picture: {e}") from None
    return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any picture as RGB; transparent parts over white, 16-bit greyscale scaled to 8."""
    if picture.mode.startswith("I") or picture.mode == "F":
        levels = np.asarray(picture, np.float64)
        picture = Image.fromarray(np.uint8(np.clip(levels * (255 / 65535), 0, 255).round()))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def edit_size(width: int, height: int, longer: int, multiple: int = 32) -> tuple[int, int]:
    """The (width, height) that an edit works at: the longer side exactly `longer`, the shorter
    to the nearest multiple, ties to even (the release's rule).

    Raises InputError where the shorter side would vanish.
    """
    ratio = longer / max(width, height)
    shorter = round(min(width, height) * ratio / multiple) * multiple
    if shorter == 0:
        raise InputError(f"a picture of {width}x{height} is too narrow to edit at {longer}; give a "
                         f"larger image size or crop it")
    return (longer, shorter) if width >= height else (shorter, longer)


def check_size(name: str, value: int, multiple: int) -> None:
    """Raises InputError where a side is not a positive multiple."""
    if value <= 0 or value % multiple:
        lower = max(value // multiple, 1) * multiple
        raise InputError(f"{name} {value} is not a multiple of {multiple}; use {lower} or "
                         f"{lower + multiple}")


def to_array(picture: Image.Image) -> np.ndarray:
    """An RGB picture as float32 [H, W, 3] in [-1, 1]."""
    return np.asarray(picture, np.float32) / 255 * 2 - 1


def to_picture(array: np.ndarray) -> Image.Image:
    """[H, W, 3] in [0, 1] as an RGB picture."""
    return Image.fromarray((np.asarray(array, np.float32) * 255).round().astype(np.uint8))


def check_output(path: Path) -> None:
    """Raises InputError where a picture could not be written there; called before long work."""
    Image.init()
    if path.suffix.lower() not in Image.EXTENSION:
        raise InputError(f"{path}: {path.suffix or 'no suffix'} is not a kind of picture; use .png")
    check_writable(path)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format its name says; InputError where that cannot be done."""
    with new_file(path) as partial:
        try:
            picture.save(partial)
        except ValueError as e:
            raise InputError(f"{path}: {e}") from None
