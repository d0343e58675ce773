"""Reading pictures back into scenes, and the scores that come from it, as JAX functions."""

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.data.blocks.captions import Goal
from unipic_jax.data.blocks.scenes import CELL, COLOURS, EMPTY, GRID, TEMPLATES, UNREADABLE, Scene

# Where a cell differs more than this (root mean square over pixels and channels), or is this near
# to another one (0 half-way, 1 at the cell itself), it is not read.
MOST_RESIDUAL, LEAST_MARGIN = 0.2, 0.25

_KNOWN = TEMPLATES.reshape(-1, CELL * CELL * 3).astype(np.float32) / 255  # [K, 768]
_KINDS = TEMPLATES.shape[1]  # on one background
_SQUARES = (_KNOWN**2).sum(1)
_APART = (_SQUARES[:, None] + _SQUARES - 2 * _KNOWN @ _KNOWN.T)
np.fill_diagonal(_APART, 0)


def detect(pictures: jax.Array, least: float = LEAST_MARGIN) -> tuple[Scene, jax.Array]:
    """Pictures float [B, 48, 48, 3] in [0, 1] -> (their scenes, margins float32 [B, 9]).

    The background is the one with which all cells together fit best, in squares; each cell is
    then the nearest one there is. Its margin is how far the picture is from the half-way point
    to the next nearest, in units of half their distance: 1 for a cell as drawn, 0 or less for one
    that could as well be another, and -1 for one that is near to none (MOST_RESIDUAL). A cell
    with a margin below `least` is unreadable (-2), and so is the background where no cell can be
    read.
    """
    B = pictures.shape[0]
    cells = pictures.astype(jnp.float32).reshape(B, GRID, CELL, GRID, CELL, 3)
    cells = cells.swapaxes(2, 3).reshape(B, GRID * GRID, -1)
    dots = jnp.einsum("bcp,kp->bck", cells, _KNOWN, precision="highest")
    errors = (cells * cells).sum(-1, keepdims=True) - 2 * dots + _SQUARES  # [B, 9, K]
    by_background = errors.reshape(*errors.shape[:2], -1, _KINDS)
    background = by_background.min(-1).sum(1).argmin(-1)  # [B]
    here = jnp.take_along_axis(by_background, background[:, None, None, None], 2)[:, :, 0]
    kind = here.argmin(-1)  # [B, 9]
    best = here.min(-1)

    apart = jnp.asarray(_APART)[background[:, None] * _KINDS + kind]  # [B, 9, K]
    margin = jnp.where(apart > 0, (errors - best[..., None]) / apart, jnp.inf).min(-1)
    residual = jnp.sqrt(jnp.maximum(best, 0) / _KNOWN.shape[1])
    margin = jnp.where(residual <= MOST_RESIDUAL, margin, -1)
    readable = margin >= least
    shape = jnp.where(kind == 0, EMPTY, (kind - 1) // len(COLOURS))
    colour = jnp.where(kind == 0, EMPTY, (kind - 1) % len(COLOURS))
    scene = Scene(jnp.where(readable.any(-1), background, UNREADABLE),
                  jnp.where(readable, shape, UNREADABLE), jnp.where(readable, colour, UNREADABLE))
    return jax.tree.map(lambda a: a.astype(jnp.int32), scene), margin


def generation_score(
    scene: Scene, goal: Goal, clear: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Batches of scenes against their captions -> (exact, graded), float32 [B] in [0, 1].

    Exact is 1 where all that the caption says holds and nothing else is there. Graded is the mean
    over what it says: for each sort of object, how near the count of its shape is to what it
    should be, and that of its shape and colour; the relation; the background; and that there are
    no more and no fewer objects in all. An object counts for as much as its cell is `clear`
    ([B, 9] in [0, 1]), and an empty cell for one where it is not. Graded is 1 exactly where exact
    is and all is clear.
    """
    named = goal.count > 0  # [B, 2]
    is_shape = scene.shape[:, None] == goal.shape[..., None]  # [B, 2, 9]
    is_object = is_shape & ((goal.colour[..., None] < 0)
                            | (scene.colour[:, None] == goal.colour[..., None]))
    cell = jnp.arange(GRID * GRID)
    at = jnp.stack([cell % GRID, cell // GRID])  # column and row
    once = (is_object.sum(-1) == 1).all(-1)
    place = jnp.einsum("bnc,ac->bna", is_object.astype(jnp.int32), at)  # right where it is once
    step = place[:, 0] - place[:, 1]  # [B, 2]
    holds = jnp.stack([step[:, 0] < 0, step[:, 0] > 0, step[:, 1] < 0, step[:, 1] > 0], -1)
    holds = once & jnp.take_along_axis(holds, jnp.maximum(goal.relation, 0)[:, None], 1)[:, 0]

    clear = jnp.broadcast_to(clear, scene.shape.shape)
    shapes, objects = ((a * clear[:, None]).sum(-1) for a in (is_shape, is_object))  # [B, 2]
    total = jnp.where(scene.shape == EMPTY, 1 - clear, 1).sum(-1)
    marks = jnp.concatenate([
        _near(shapes, goal.count), _near(objects, goal.count),
        _near(total, goal.count.sum(-1))[:, None], holds[:, None],
        (scene.background == goal.background)[:, None]], -1)
    said = jnp.concatenate([
        named, named & (goal.colour >= 0), jnp.ones_like(named[:, :1]),
        (goal.relation >= 0)[:, None], (goal.background >= 0)[:, None]], -1)
    graded = jnp.where(said, marks, 0).sum(-1) / said.sum(-1)
    exact = jnp.where(said, marks == 1, True).all(-1)
    return exact.astype(jnp.float32), graded


def _near(count, wanted):
    """1 where two counts are equal, and down to 0 where they differ by the larger one."""
    return 1 - abs(count - wanted) / jnp.maximum(jnp.maximum(count, wanted), 1)


def edit_score(scene: Scene, target: Scene, source: Scene) -> tuple[jax.Array, jax.Array]:
    """Batches of scenes of edited pictures -> (exact, preserved), float32 [B] in [0, 1].

    Exact is 1 where the scene is the target. Preserved is the share, of the cells and the
    background that are the same in source and target, that are the same in the scene too.
    """
    keep, same = (
        jnp.concatenate([(a.background == b.background)[:, None],
                         (a.shape == b.shape) & (a.colour == b.colour)], -1)
        for a, b in ((source, target), (scene, target)))  # [B, 1 + 9]
    return same.all(-1).astype(jnp.float32), (keep & same).sum(-1) / keep.sum(-1)


def answer_score(answers: list[str], wanted: list[str]) -> np.ndarray:
    """float32 [N]: 1 where an answer is as wanted but for case, spaces and a full stop."""

    def plain(text):
        return " ".join(text.lower().split()).removesuffix(".").rstrip()

    return np.array([plain(a) == plain(b) for a, b in zip(answers, wanted, strict=True)],
                    np.float32)
