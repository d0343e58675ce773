"""Contact sheets: places, sizes, wrapped text."""

import numpy as np
from PIL import Image

from unipic_jax.core import sheets
from unipic_jax.core.sheets import GAP, LINE, contact_sheet


def box(array, colour):
    """Left, top, right, bottom of all pixels of a colour."""
    y, x = np.nonzero((array == colour).all(-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def test_small_pictures_are_enlarged_and_lie_in_a_grid():
    red, green = Image.new("RGB", (48, 48), "red"), Image.new("RGB", (48, 24), "lime")
    sheet = contact_sheet([[red, None], [None, green]], ["add a circle", "remove it"],
                          ["source", "result"])
    assert sheet.size == (3 * GAP + 2 * 192, GAP + 3 * LINE + 192 + GAP + 96 + GAP)
    array = np.asarray(sheet)
    top = GAP + 2 * LINE
    assert box(array, (255, 0, 0)) == (GAP, top, GAP + 192, top + 192)
    second = top + 192 + GAP + LINE
    assert box(array, (0, 255, 0)) == (2 * GAP + 192, second, 2 * GAP + 384, second + 96)
    assert (array[GAP:GAP + LINE] < 128).any()  # the headings


def test_pixels_stay_sharp():
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    sheet = np.asarray(contact_sheet([[Image.fromarray(noise)]], [""]))
    np.testing.assert_array_equal(sheet[GAP + 2:GAP + 192:4, GAP + 2:GAP + 192:4], noise)


def test_large_pictures_keep_their_size():
    assert contact_sheet([[Image.new("RGB", (512, 256))]], [""]).size == (
        512 + 2 * GAP, 256 + 2 * GAP)


def test_long_text_is_wrapped():
    class Font:
        def getlength(self, text):
            return 10 * len(text)

    assert sheets._wrapped("a red square over it", 100, Font()) == ["a red", "square", "over it"]
    assert sheets._wrapped("an enormouswordhere b", 80, Font()) == ["an", "enormous", "wordhere",
                                                                     "b"]
    assert sheets._wrapped("  ", 80, Font()) == []
    short, long = (contact_sheet([[Image.new("RGB", (48, 48))]], [text])
                   for text in ("red", "move the red square to the left of the blue circle " * 2))
    assert short.width == long.width
    assert (long.height - short.height) % LINE == 0
    assert long.height > short.height
