"""Rewards that can be traced: functions of pictures and goals, for one jitted step.

Pictures are float [B, 48, 48, 3] in [0, 1]. They are first rounded to 256 levels, as a picture
that is sent to a reward server is, so that both ways give the same rewards. On a mesh each device
scores those that it holds.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.data import blocks
from unipic_jax.data.blocks import EditGoal, Goal, Scene

Reward = Callable[[jax.Array, Goal | EditGoal], jax.Array]
"""(pictures, a batch of goals) -> float32 [B]"""

PRESERVED = 0.25  # what an edit that does nothing and spoils nothing is worth
CLEAR = 0.5  # the margin from which on a cell is drawn clearly; half of it can be read


def _where_it_lies(reward: Reward) -> Reward:
    @functools.wraps(reward)
    def score(pictures, goal):
        spec = meshes.spec_of(pictures)
        if spec is None:
            return reward(pictures, goal)
        batch = P(spec[0])
        pictures, goal = jax.tree.map(
            lambda a: jax.reshard(a, P(spec[0], *[None] * (a.ndim - 1))), (pictures, goal))
        return jax.shard_map(reward, in_specs=batch, out_specs=batch)(pictures, goal)

    return score


@_where_it_lies
def generation(pictures: jax.Array, goal: Goal) -> jax.Array:
    """How much of its caption each picture shows, and how clearly, float32 [B] in [0, 1]: the
    graded score of `blocks.generation_score`, where a cell is clear from a margin of CLEAR on
    (`blocks.detect`) and less below. 1 exactly where it shows all of it clearly, and nothing
    else."""
    scene, clear = _clearness(pictures)
    return blocks.generation_score(scene, goal, clear)[1]


@_where_it_lies
def generation_exact(pictures: jax.Array, goal: Goal) -> jax.Array:
    """1 where a picture shows its caption and nothing else, and 0 elsewhere: float32 [B]."""
    return blocks.generation_score(_read(pictures), goal)[0]


@_where_it_lies
def edit(pictures: jax.Array, goal: EditGoal) -> jax.Array:
    """How well each picture is its goal's source edited, float32 [B] in [0, 1].

    A scene has 19 properties: its background, and the shape and the colour of each cell. Each has
    a credit: of those that are as in the target, the cell's margin (`blocks.detect`) over CLEAR,
    from 0 to 1, and of the background 1; of others none. With `asked` the properties that differ
    between source and target, `done` the sum of their credits, and `spoilt` what the other ones
    lack of theirs,

        score = 1/4 preserved + 3/4 done / (|asked| + spoilt)

    where `preserved` is that of `blocks.edit_score`, and the fraction is the Jaccard index of the
    changes asked for and the changes made. It is 1 exactly where the scene is the target and all
    of it clear, so that of two right pictures, or wrong ones, the clearer one is worth more; 1/4
    for the source as it was, so that leaving it alone is better than spoiling it and worse than
    any attempt that succeeds in part; and 0 where no cell is like any.
    """
    _, preserved = blocks.edit_score(_read(pictures), goal.target, goal.source)
    scene, clear = _clearness(pictures)
    now, after, before = map(_properties, (scene, goal.target, goal.source))
    credit = (now == after) * jnp.concatenate([jnp.ones_like(clear[:, :1]), clear, clear], -1)
    asked = after != before
    done = jnp.where(asked, credit, 0).sum(-1)
    either = jnp.where(asked, 1, 1 - credit).sum(-1)
    jaccard = jnp.where(either > 0, done / jnp.where(either > 0, either, 1), 1)  # none is asked
    return PRESERVED * preserved + (1 - PRESERVED) * jaccard


@_where_it_lies
def edit_exact(pictures: jax.Array, goal: EditGoal) -> jax.Array:
    """1 where a picture shows the target and 0 elsewhere: float32 [B]."""
    return blocks.edit_score(_read(pictures), goal.target, goal.source)[0]


def weighted(terms: Sequence[tuple[float, Reward]]) -> Reward:
    """The sum of rewards, each times its weight."""

    def reward(pictures, goal):
        return sum(weight * term(pictures, goal) for weight, term in terms)

    return reward


def _read(pictures) -> Scene:
    return blocks.detect(_levels(pictures))[0]


def _clearness(pictures) -> tuple[Scene, jax.Array]:
    """The scenes of all cells that are like any, and how clear they are, [B, 9] from 0 to 1."""
    scene, margin = blocks.detect(_levels(pictures), least=0.0)
    return scene, jnp.clip(margin / CLEAR, 0, 1)


def _levels(pictures):
    return jnp.round(jnp.clip(pictures.astype(jnp.float32), 0, 1) * 255) / 255


def _properties(scene: Scene) -> jax.Array:  # [B, 19]
    return jnp.concatenate([scene.background[:, None], scene.shape, scene.colour], -1)
