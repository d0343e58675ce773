"""Questions about a picture and their answers in a few words; what a picture shows, and what an
edit changes."""

import numpy as np

from unipic_jax.data.blocks.captions import NUMBERS, PLURALS, RELATIONS, noun, related
from unipic_jax.data.blocks.edits import names
from unipic_jax.data.blocks.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    PLACES,
    SHAPES,
    Objects,
    Scene,
    scene,
)

QUESTION_KINDS = ("describe", "colour", "content", "place", "count", "exists", "background",
                  "relation")
_colours, _backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)


def question(
    rng: np.random.Generator, kind: str, background: int, objects: Objects
) -> tuple[str, str] | None:
    """A question about a scene, which has one object at least, and its answer; None where the
    draw does not suit the scene, for the caller to draw again.
    """
    cell = list(objects)[rng.integers(len(objects))]
    shape, colour = objects[cell]
    if kind == "describe":
        return "Describe the picture.", description(scene(background, objects))
    if kind == "background":
        return "What color is the background?", _backgrounds[background]
    if kind == "count":
        return _count(rng, objects)
    if kind == "exists":
        kind = objects[cell]
        if rng.integers(2):
            kind = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
            while kind in objects.values():
                kind = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
        return f"Is there a {noun(*kind)}?", "yes" if kind in objects.values() else "no"
    if kind == "content":
        at = cell if rng.integers(4) else int(rng.integers(CELLS))
        return f"What is in the {PLACES[at]}?", f"a {noun(*objects[at])}" if at in objects else (
            "nothing")
    if kind == "colour":
        if sum(other == shape for other, _ in objects.values()) == 1 and rng.integers(3):
            return f"What color is the {noun(shape)}?", _colours[colour]
        return f"What color is the {noun(shape)} in the {PLACES[cell]}?", _colours[colour]
    name = names(objects, cell)[0]
    if kind == "place":
        if name.endswith(PLACES[cell]):
            return None
        return f"Where is {name}?", f"in the {PLACES[cell]}"
    relation = int(rng.integers(len(RELATIONS)))
    others = [c for c in objects if related(relation, c, cell)]
    if len(others) > 1 or (not others and rng.integers(2)):
        return None
    answer = f"a {noun(*objects[others[0]])}" if others else "nothing"
    return f"What is {RELATIONS[relation]} {name}?", answer


def description(shown: Scene) -> str:
    """All that is known of a scene, its objects in reading order; a colour or a background of -1
    is not."""
    listed = [f"a {noun(shown.shape[c], shown.colour[c])} in the {PLACES[c]}"
              for c in np.flatnonzero(shown.shape >= 0)]
    if shown.background >= 0:
        listed.append(f"on a {_backgrounds[shown.background]} background")
    return ", ".join(listed)


def change(source: Scene, target: Scene) -> str:
    """What an edit does, cell by cell in reading order, and to the background."""
    def thing(shown, cell):
        return f"a {noun(shown.shape[cell], shown.colour[cell])}" if shown.shape[cell] >= 0 else (
            "nothing")

    changed = (source.shape != target.shape) | (source.colour != target.colour)
    listed = [f"{thing(source, c)} in the {PLACES[c]} to {thing(target, c)}"
              for c in np.flatnonzero(changed)]
    if source.background != target.background:
        listed.append(f"the background to {_backgrounds[target.background]}")
    return ", ".join(listed)


def _count(rng, objects: Objects) -> tuple[str, str]:
    """How many there are of a shape, of a colour, or in all; of what there is two times in
    three."""
    shape, colour = list(objects.values())[rng.integers(len(objects))]
    if rng.integers(3) == 0:
        shape, colour = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
    what, counted = (
        (PLURALS[SHAPES[shape]], [s == shape for s, _ in objects.values()]),
        (f"{_colours[colour]} objects", [c == colour for _, c in objects.values()]),
        ("objects", [True] * len(objects)))[rng.integers(3)]
    return f"How many {what} are there?", NUMBERS[sum(counted)]
