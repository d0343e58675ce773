"""Rewards of pictures of blocks: what they are worth, and that they can be part of a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.data import blocks
from unipic_jax.data.blocks import scenes
from unipic_jax.rl.rewards import traceable

KINDS = {"generate": (traceable.generation, traceable.generation_exact),
         "edit": (traceable.edit, traceable.edit_exact)}
RED, GREEN, BLUE, YELLOW = 0, 1, 2, 3
CIRCLE, SQUARE, TRIANGLE = 0, 1, 2
WHITE, BLACK = 0, 1
jitted = {f: jax.jit(f) for pair in KINDS.values() for f in pair}


def floats(pictures):
    return np.asarray(pictures, np.float32) / 255


def score_of(source, target, result) -> float:
    """The graded edit score of scenes (background, {cell: (shape, colour)})."""
    source, target, result = (
        jax.tree.map(lambda a: np.asarray(a)[None], scenes.scene(*s))
        for s in (source, target, result))
    goal = blocks.EditGoal(source, target)
    return float(jitted[traceable.edit](floats(blocks.draw(result)), goal)[0])


BEFORE = WHITE, {0: (CIRCLE, RED), 4: (SQUARE, BLUE)}
RECOLOURED = WHITE, {0: (CIRCLE, GREEN), 4: (SQUARE, BLUE)}
ADDED = WHITE, BEFORE[1] | {8: (TRIANGLE, GREEN)}
MOVED = WHITE, {2: (CIRCLE, RED), 4: (SQUARE, BLUE)}


@pytest.mark.parametrize(("target", "result", "preserved", "jaccard"), [
    (RECOLOURED, RECOLOURED, 1, 1),
    (RECOLOURED, BEFORE, 1, 0),
    (RECOLOURED, (WHITE, {0: (CIRCLE, BLUE), 4: (SQUARE, BLUE)}), 1, 0),  # another colour
    (RECOLOURED, (WHITE, {0: (SQUARE, GREEN), 4: (SQUARE, BLUE)}), 1, 1 / 2),  # shape spoilt
    (RECOLOURED, (WHITE, {0: (CIRCLE, GREEN)}), 8 / 9, 1 / 3),  # the other one lost: 2 spoilt
    (RECOLOURED, (BLACK, RECOLOURED[1]), 8 / 9, 1 / 2),
    (ADDED, (WHITE, BEFORE[1] | {8: (TRIANGLE, RED)}), 1, 1 / 2),  # the right shape alone
    (ADDED, (WHITE, BEFORE[1] | {7: (TRIANGLE, GREEN)}), 8 / 9, 0),  # in a wrong place
    (MOVED, (WHITE, {0: (CIRCLE, RED), 2: (CIRCLE, RED), 4: (SQUARE, BLUE)}), 1, 1 / 2),  # a copy
    ((BLACK, BEFORE[1]), (BLACK, BEFORE[1]), 1, 1),
    ((BLACK, BEFORE[1]), (BLACK, {}), 7 / 9, 1 / 5),
])
def test_edit_score_is_its_formula(target, result, preserved, jaccard):
    assert score_of(BEFORE, target, result) == pytest.approx(preserved / 4 + jaccard * 3 / 4)


@pytest.mark.parametrize(("changed", "share"),
                         [(True, 0.0), (True, 0.3), (True, 0.4), (False, 0.3), (False, 0.4)])
def test_an_edit_is_worth_more_the_clearer_it_is(changed, share):
    """`share` of another colour is mixed into the cell that changes, or into one that stays: a
    margin of 1 - 2 share (no colour lies between these), of which half is clear and a quarter
    can be read."""
    cell, other = (0, (CIRCLE, BLUE)) if changed else (4, (SQUARE, GREEN))
    spoilt = scenes.scene(WHITE, RECOLOURED[1] | {cell: other})
    clean, mixed = (floats(blocks.draw(s)) for s in (scenes.scene(*RECOLOURED), spoilt))
    goal = blocks.EditGoal(*(jax.tree.map(lambda a: np.asarray(a)[None], scenes.scene(*s))
                             for s in (BEFORE, RECOLOURED)))
    score = jitted[traceable.edit](((1 - share) * clean + share * mixed)[None], goal)[0]
    credit = min((1 - 2 * share) / 0.5, 1)
    preserved = 1 if changed or share < 3 / 8 else 8 / 9
    lost = 1 - credit  # of the colour and of the shape, which here is not asked for
    jaccard = credit / (1 + lost) if changed else 1 / (1 + 2 * lost)
    assert score == pytest.approx(preserved / 4 + jaccard * 3 / 4, abs=5e-3)  # of 256 levels


@pytest.mark.parametrize(("share", "nothing"), [(0.0, False), (0.4, False), (0.4, True)])
def test_a_caption_is_worth_more_the_clearer_it_is_drawn(share, nothing):
    """Of "a green circle" some of another colour is mixed into the circle, or some of a second one
    into an empty cell."""
    circle = {0: (CIRCLE, GREEN)}
    other = circle | {4: (CIRCLE, YELLOW)} if nothing else {0: (CIRCLE, BLUE)}
    clean, mixed = (floats(blocks.draw(scenes.scene(WHITE, o))) for o in (circle, other))
    goal = blocks.Goal(*(np.asarray(a)[None] for a in (
        [CIRCLE, -1], [GREEN, -1], [1, 0], -1, -1)))
    score = jitted[traceable.generation](((1 - share) * clean + share * mixed)[None], goal)[0]
    credit = min((1 - 2 * share) / 0.5, 1)
    # Of the shape, of its colour, and of the number of objects.
    marks = (1, 1, 1 / (2 - credit)) if nothing else (credit, credit, 1)
    assert score == pytest.approx(np.mean(marks), abs=5e-3)


@pytest.mark.parametrize("task", KINDS)
def test_graded_is_one_exactly_where_exact(task):
    found = blocks.evaluation(task, 4)
    graded, exact = (jitted[f] for f in KINDS[task])
    wrong = np.roll(found.target, 1, 0)
    noise = np.random.default_rng(0).random(found.target.shape).astype(np.float32)
    assert (graded(floats(found.target), found.goal) == 1).all()
    assert (exact(floats(found.target), found.goal) == 1).all()
    some = graded(floats(wrong), found.goal)
    assert np.array_equal(some == 1, exact(floats(wrong), found.goal) == 1)
    assert some.min() >= 0
    assert len(np.unique(some)) > 5  # it tells pictures apart
    assert exact(noise, found.goal).max() == 0
    nothing = np.full_like(noise, np.nan)
    if task == "generate":  # as a scene of which nothing can be read
        unread = scenes.Scene(*(np.full(s, -2) for s in ((len(noise),), *[(len(noise), 9)] * 2)))
        worth = blocks.generation_score(unread, found.goal)[1]
        for mess in (noise, nothing):
            np.testing.assert_allclose(graded(mess, found.goal), worth, rtol=1e-6)
    if task == "edit":
        assert graded(nothing, found.goal).max() == 0
        assert graded(noise, found.goal).max() == 0
        assert (graded(floats(found.source), found.goal) == 0.25).all()


def test_pictures_are_rounded_as_files_are():
    """A picture just inside what can be read is scored alike as floats and as uint8."""
    found = blocks.evaluation("generate", 4)
    rng = np.random.default_rng(3)
    pictures = floats(found.target) + rng.normal(0, 0.25, found.target.shape).astype(np.float32)
    pictures[0] = 2.5  # out of range
    levels = (np.clip(pictures, 0, 1) * 255).round().astype(np.uint8)
    score = jitted[traceable.generation]
    assert np.array_equal(score(pictures, found.goal), score(floats(levels), found.goal))


def test_a_weighted_sum():
    found = blocks.evaluation("edit", 4)
    pictures = floats(np.roll(found.target, 1, 0))
    both = traceable.weighted([(0.25, traceable.edit), (2.0, traceable.edit_exact)])
    parts = [np.asarray(jitted[f](pictures, found.goal)) for f in KINDS["edit"]]
    np.testing.assert_allclose(jax.jit(both)(pictures, found.goal),
                               0.25 * parts[0] + 2 * parts[1], rtol=1e-6)
    assert jnp.asarray(parts[0]).dtype == jnp.float32


@pytest.mark.parametrize("task", KINDS)
def test_devices_score_what_they_hold(task):
    """Inside of a program on a mesh of 8: the same scores, spread as the pictures are."""
    found = blocks.evaluation(task, 4)
    pictures = floats(np.roll(found.target, 1, 0))
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    both = traceable.weighted([(1, KINDS[task][0]), (2, KINDS[task][1])])
    one = sum(n * jitted[f](pictures, found.goal) for n, f in zip((1, 2), KINDS[task]))
    with jax.set_mesh(mesh):
        there = jax.device_put((pictures, found.goal), NamedSharding(mesh, P(meshes.BATCH)))
        many = jax.jit(both)(*there)
    assert many.sharding.spec == P(meshes.BATCH)
    assert np.array_equal(one, many)
