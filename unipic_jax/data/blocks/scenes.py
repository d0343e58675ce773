"""Scenes of the blocks world, and how they are drawn.

A picture is a 3x3 grid of 16-pixel cells on one background; a cell is empty or has one object, a
coloured shape, in its middle. Cells count in reading order.
"""

import hashlib
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (225, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 230),
    "yellow": (245, 215, 40), "purple": (160, 40, 200), "cyan": (40, 205, 220)}
BACKGROUNDS = {
    "white": (245, 245, 245), "black": (15, 15, 15), "gray": (128, 128, 128),
    "brown": (115, 70, 30)}
PLACES = ("top left", "top center", "top right", "middle left", "center", "middle right",
          "bottom left", "bottom center", "bottom right")
GRID, CELL = 3, 16
CELLS, SIDE = GRID * GRID, GRID * CELL
EMPTY, UNREADABLE = -1, -2

Objects = dict[int, tuple[int, int]]  # cell -> (shape, colour)


class Scene(NamedTuple):
    """What is where, by index into the names above; of one picture or of a batch of them.

    An empty cell has shape and colour -1; one in which nothing can be read has -2.
    """

    background: np.ndarray  # int32 [...]
    shape: np.ndarray  # int32 [..., 9]
    colour: np.ndarray  # int32 [..., 9]


def scene(background: int, objects: Objects) -> Scene:
    """The scene with these objects."""
    kinds = np.full((2, CELLS), EMPTY, np.int32)
    for cell, kind in objects.items():
        kinds[:, cell] = kind
    return Scene(np.int32(background), *kinds)


def scatter(rng: np.random.Generator, kinds: list[tuple[int, int]]) -> Objects:
    """Objects of these (shape, colour) in different cells, drawn at random."""
    return dict(zip(rng.permutation(CELLS)[:len(kinds)].tolist(), kinds))


def draw(scenes: Scene) -> np.ndarray:
    """The pictures uint8 [..., 48, 48, 3] of scenes that are readable throughout."""
    kinds = np.where(scenes.shape < 0, 0, 1 + scenes.shape * len(COLOURS) + scenes.colour)
    cells = TEMPLATES[np.asarray(scenes.background)[..., None], kinds]  # [..., 9, 16, 16, 3]
    *batch, _, _, _, _ = cells.shape
    rows = cells.reshape(*batch, GRID, GRID, CELL, CELL, 3).swapaxes(-4, -3)
    return rows.reshape(*batch, SIDE, SIDE, 3)


def is_held_out(one: Scene) -> bool:
    """Whether a scene is one of the 1 in 16 that no training example has."""
    return _in_16(one.background, one.shape, one.colour)


def is_held_out_pair(pair: list[tuple[int, int]]) -> bool:
    """Whether two coloured shapes, in this order, are among the 1 in 16 that no training caption
    names together with their colours."""
    return _in_16(np.array(pair))


def _in_16(*arrays) -> bool:
    held = b"".join(np.asarray(a, np.int8).tobytes() for a in arrays)
    return hashlib.blake2b(held, digest_size=1).digest()[0] < 16  # of 256


def _coverage() -> np.ndarray:
    """How much of each pixel of a cell a shape covers: float64 [shapes, 16, 16] in [0, 1]."""
    fine = 8  # samples a pixel, along each side
    at = (np.arange(CELL * fine) + 0.5) / fine - CELL / 2
    y, x = np.meshgrid(at, at, indexing="ij")
    radius = np.hypot(x, y)
    masks = {
        "circle": radius < 5.6,
        "square": np.maximum(abs(x), abs(y)) < 6,
        "triangle": (y < 5.5) & (abs(x) < 6.5 * (y + 6.5) / 12),
        "cross": (np.minimum(abs(x), abs(y)) < 2) & (np.maximum(abs(x), abs(y)) < 6.5),
        "ring": (radius > 3.4) & (radius < 6.5)}
    masks = np.stack([masks[name] for name in SHAPES]).astype(float)
    return masks.reshape(len(SHAPES), CELL, fine, CELL, fine).mean((2, 4))


def _templates() -> np.ndarray:
    """Every cell there is: uint8 [backgrounds, 1 + shapes * colours, 16, 16, 3], the empty one
    first."""
    colours = np.array(list(COLOURS.values()))[:, None, None]
    grounds = np.array(list(BACKGROUNDS.values()))[:, None, None, None, None]
    cells = grounds + _coverage()[:, None, :, :, None] * (colours - grounds)
    cells = cells.reshape(len(BACKGROUNDS), -1, CELL, CELL, 3)
    empty = np.broadcast_to(grounds[:, 0], (len(BACKGROUNDS), 1, CELL, CELL, 3))
    return np.concatenate([empty, cells], 1).round().astype(np.uint8)


TEMPLATES = _templates()
