"""Sizes of equal token count for pictures of different shapes, and pictures cut to them."""

import math

import numpy as np
from PIL import Image

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
TOLERANCE = 0.05  # of the logarithm of the aspect ratio, given up for an equal token count

Size = tuple[int, int]  # width, height


def sizes(area: int, multiple: int, ratios: tuple = RATIOS) -> tuple[Size, ...]:
    """The size of about `area` pixels for each ratio width:height, sides multiples of `multiple`.

    Of the sizes whose aspect is within 5 % of a ratio, the one whose count of multiple x multiple
    tokens is nearest to the area's is taken, so that a step takes the same time whichever the
    bucket (see `spread`). Ratios that fall on one size at a small area share it.
    """
    tokens = area / multiple**2

    def cost(size: Size, ratio: float):
        aspect = abs(math.log(size[0] / size[1] / ratio))
        return max(aspect - TOLERANCE, 0), abs(size[0] * size[1] - tokens), aspect

    def best(ratio: float) -> Size:
        rows = range(1, math.ceil(tokens) + 1)
        grids = [(max(w, 1), h) for h in rows for w in (int(tokens / h), int(tokens / h) + 1)]
        return min(grids, key=lambda size: cost(size, ratio))

    chosen = {}  # a dict keeps the order
    for w, h in ratios:
        across, down = best(max(w, h) / min(w, h))  # so that 3:4 is 4:3 turned
        chosen[(across, down) if w >= h else (down, across)] = None
    return tuple((w * multiple, h * multiple) for w, h in chosen)


def spread(chosen: tuple[Size, ...]) -> float:
    """How much larger the largest of some sizes is than the smallest: 0 where all are equal.

    It is 0.022 for 512 x 512 pixels and multiples of 16, and 0.005 for 1024 x 1024.
    """
    counts = [w * h for w, h in chosen]
    return max(counts) / min(counts) - 1


def nearest(pictures: np.ndarray, chosen: tuple[Size, ...]) -> np.ndarray:
    """The bucket, int [N], whose aspect is nearest in logarithm to that of each picture.

    pictures: int [N, 2], width and height.
    """
    aspect = np.log(pictures[:, 0] / pictures[:, 1])
    centers = np.log([w / h for w, h in chosen])
    return np.abs(aspect[:, None] - centers).argmin(1)


def fit(picture: np.ndarray, size: Size) -> np.ndarray:
    """A picture, uint8 [H, W, 3], scaled to cover a size and cut to it about its centre."""
    height, width = picture.shape[:2]
    if (width, height) == size:
        return picture
    scale = min(width / size[0], height / size[1])
    across, down = size[0] * scale, size[1] * scale
    left, top = (width - across) / 2, (height - down) / 2
    box = (left, top, left + across, top + down)
    # What is far larger is first averaged down to twice the size, which is several times faster.
    return np.asarray(Image.fromarray(picture).resize(
        size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))
