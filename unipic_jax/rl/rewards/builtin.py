"""The blocks rewards as a scorer, which takes goals as JSON and scores on this host."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax import __version__
from unipic_jax.data.blocks import EditGoal, Goal, Scene
from unipic_jax.data.blocks.scenes import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIDE
from unipic_jax.rl.rewards import traceable
from unipic_jax.rl.rewards.host import Answer, Health, Sample, Score

NAMES = ("graded", "exact")

# Of each field of a goal: its shape, and the numbers below which it lies; -1 and above it must be.
_GOAL = Goal(((2,), len(SHAPES)), ((2,), len(COLOURS)), ((2,), CELLS + 1), ((), 4),
             ((), len(BACKGROUNDS)))
_SCENE = Scene(((), len(BACKGROUNDS)), ((CELLS,), len(SHAPES)), ((CELLS,), len(COLOURS)))
_FIELDS = {"generate": _GOAL, "edit": EditGoal(_SCENE, _SCENE)}


class BlocksScorer(NamedTuple):
    """The graded and the exact score of pictures uint8 [48, 48, 3] against the goals that their
    metadata has as `goal_metadata` writes them."""

    task: str  # generate or edit

    def health(self) -> Health:
        return Health(f"blocks-{self.task}", __version__, NAMES)

    def score(self, samples: Sequence[Sample]) -> Answer:
        scores, good, goals = [], [], []
        for sample in samples:
            goal = _goal(sample.metadata, _FIELDS[self.task])
            if sample.image.shape != (SIDE, SIDE, 3):
                height, width, _ = sample.image.shape
                scores.append(Score(sample.id, None, f"a picture of blocks is {SIDE}x{SIDE}, and "
                                    f"this one {width}x{height}"))
            elif goal is None:
                scores.append(Score(sample.id, None, f"its metadata is no goal of blocks to "
                                    f"{self.task}"))
            else:
                good.append(sample)
                goals.append(goal)
        if good:
            # To a power of two, so that few sizes are ever compiled.
            fill = [0] * ((1 << (len(good) - 1).bit_length()) - len(good))
            at = [*range(len(good)), *fill]
            pictures = np.stack([good[i].image for i in at])
            goal = jax.tree.map(lambda *leaves: np.stack(leaves), *(goals[i] for i in at))
            for sample, values in zip(good, np.asarray(_scores(self.task, pictures, goal)).T):
                scores.append(Score(sample.id, dict(zip(NAMES, values.tolist()))))
        return Answer(__version__, scores)


@functools.partial(jax.jit, static_argnames="task")
def _scores(task, pictures, goal):  # [2, B]
    pictures = pictures.astype(jnp.float32) / 255
    kinds = {"generate": (traceable.generation, traceable.generation_exact),
             "edit": (traceable.edit, traceable.edit_exact)}
    return jnp.stack([reward(pictures, goal) for reward in kinds[task]])


def goal_metadata(goal: Goal | EditGoal) -> list[dict]:
    """The goals of a batch as JSON has them, one for each sample."""
    if isinstance(goal, EditGoal):
        return [{"source": a, "target": b} for a, b in zip(*map(goal_metadata, goal))]
    rows = zip(*(np.asarray(field).tolist() for field in goal))
    return [dict(zip(goal._fields, row)) for row in rows]


def _goal(metadata, fields):
    """A goal of one sample, or None where the metadata is none."""
    if not isinstance(metadata, dict):
        return None
    if isinstance(fields, EditGoal):
        scenes = [_goal(metadata.get(name), _SCENE) for name in fields._fields]
        return None if any(s is None for s in scenes) else EditGoal(*scenes)
    arrays = []
    for name, (shape, limit) in zip(fields._fields, fields):
        try:
            array = np.array(metadata.get(name))
        except ValueError:  # lists of different lengths
            return None
        if array.shape != shape or array.dtype.kind != "i" or not (
                (array >= -1) & (array < limit)).all():
            return None
        arrays.append(array.astype(np.int32))
    return type(fields)(*arrays)
