"""Captions of GenEval's six kinds, and what a picture has to have to satisfy one; and captions
that leave nothing of a picture open."""

from typing import NamedTuple

import numpy as np

from unipic_jax.data.blocks.scenes import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    PLACES,
    SHAPES,
    Objects,
    scatter,
)

GENERATION_KINDS = ("one_object", "two_objects", "counting", "colours", "position",
                    "colour_to_object")
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("to the left of", "to the right of", "above", "below")
FRAMES = ("{}", "a picture of {}", "an image of {}", "a drawing of {}", "a picture with {}")
PLURALS = {name: name + ("es" if name == "cross" else "s") for name in SHAPES}

_shapes, _colours, _backgrounds = SHAPES, tuple(COLOURS), tuple(BACKGROUNDS)


class Goal(NamedTuple):
    """What a caption says, of one caption or of a batch; -1 is what it does not say.

    It names one or two sorts of objects, each so many times, and nothing else may be there.
    """

    shape: np.ndarray  # int32 [..., 2]
    colour: np.ndarray  # int32 [..., 2]
    count: np.ndarray  # int32 [..., 2], 0 for a sort that is not there
    relation: np.ndarray  # int32 [...], of the first to the second; see `related`
    background: np.ndarray  # int32 [...]


def related(relation: int, first: int, second: int) -> bool:
    """Whether the object in cell `first` stands in RELATIONS[relation] to that in `second`.

    Left and right compare columns alone, above and below compare rows alone.
    """
    row = first // GRID - second // GRID
    column = first % GRID - second % GRID
    return (column < 0, column > 0, row < 0, row > 0)[relation]


def noun(shape: int, colour: int = -1) -> str:
    """"circle" or "red circle"."""
    return (_colours[colour] + " " if colour >= 0 else "") + _shapes[shape]


def caption(
    rng: np.random.Generator, kind: str
) -> tuple[str, Goal, int, list[tuple[int, int]]]:
    """A caption, its goal, and a background and (shape, colour)s that satisfy it, drawn at random
    where the caption leaves them open; several objects of one sort are of one colour."""
    first, second = map(int, rng.permutation(len(SHAPES))[:2])
    shapes, count, said, relation = [first], [1, 0], [-1, -1], -1
    if kind in ("two_objects", "position", "colour_to_object"):
        shapes, count = [first, second], [1, 1]
    if kind in ("colours", "colour_to_object"):
        said[:len(shapes)] = rng.permutation(len(COLOURS))[:len(shapes)].tolist()
    phrases = ["a " + noun(s, c) for s, c in zip(shapes, said)]
    if kind == "counting":
        count[0] = int(rng.integers(2, len(NUMBERS)))
        phrases = [f"{NUMBERS[count[0]]} {PLURALS[_shapes[first]]}"]
        shapes = [first] * count[0]
    elif kind == "colours" and rng.integers(3) == 0:
        phrases = [f"a {_shapes[first]} in {_colours[said[0]]}"]
    text = " and ".join(phrases)
    if kind == "position":
        relation = int(rng.integers(len(RELATIONS)))
        text = f" {RELATIONS[relation]} ".join(phrases)

    colours = rng.integers(len(COLOURS), size=len(shapes)).tolist()
    if kind == "counting":
        colours = colours[:1] * len(shapes)
    elif said[0] >= 0:
        colours = said[:len(shapes)]
    background, says_background = int(rng.integers(len(BACKGROUNDS))), rng.integers(4) == 0
    text = FRAMES[rng.integers(len(FRAMES))].format(text)
    if says_background:
        text += f" on a {_backgrounds[background]} background"
    shape = [first, second if count[1] else -1]
    goal = Goal(*(np.array(x, np.int32) for x in (
        shape, said, count, relation, background if says_background else -1)))
    return text, goal, background, list(zip(shapes, colours))


MOST_DESCRIBED = 2  # objects; the text encoders of the nano family read no longer captions


def description(
    rng: np.random.Generator, background: int, objects: Objects, order: list[int]
) -> str:
    """A caption that says all of a scene, its objects in the order of cells that is given."""
    listed = " and ".join(f"a {noun(*objects[c])} in the {PLACES[c]}" for c in order)
    text = f"{listed} on a {_backgrounds[background]} background"
    return FRAMES[rng.integers(len(FRAMES))].format(text)


def joined(
    rng: np.random.Generator, goal: Goal, objects: list[tuple[int, int]]
) -> tuple[Goal, list[tuple[int, int]]]:
    """A caption's goal and its one object with another one, of another shape, beside it."""
    (shape, _), = objects
    other = int((shape + rng.integers(1, len(SHAPES))) % len(SHAPES)), int(
        rng.integers(len(COLOURS)))
    shapes, colours, count = (np.array(a, np.int32) for a in (
        (shape, other[0]), (goal.colour[0], other[1]), (1, 1)))
    return goal._replace(shape=shapes, colour=colours, count=count), [*objects, other]


def arrange(rng: np.random.Generator, goal: Goal, kinds: list[tuple[int, int]]) -> Objects:
    """The objects of a caption in cells drawn at random, so that its relation holds."""
    objects = scatter(rng, kinds)
    while goal.relation >= 0 and not related(goal.relation, *objects):
        objects = scatter(rng, kinds)
    return objects


SIDE_BY_SIDE, STACKED, IN_ROW, CORNERS = (3, 5), (1, 7), (3, 4, 5), (0, 2, 6, 8)


def pose(goal: Goal, kinds: list[tuple[int, int]]) -> Objects:
    """The objects of a caption where it leaves their places open, as pictures are composed: one in
    the centre, two side by side or above each other, more in a row or in the corners.

    Such a caption has but one layout. Were places random, all cells of a noisy picture would have
    to agree on one of them, which takes small models several times longer to learn than all else.
    """
    cells = {1: (4,), 2: SIDE_BY_SIDE, 3: IN_ROW, 4: CORNERS}[len(kinds)]
    if goal.relation >= 0:
        cells = STACKED if RELATIONS[goal.relation] in ("above", "below") else SIDE_BY_SIDE
        if not related(goal.relation, *cells):
            cells = cells[::-1]
    return dict(zip(cells, kinds))
