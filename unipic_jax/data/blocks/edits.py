"""Instructions of the kinds of GEdit and ImgEdit, each of which says exactly one target."""

from typing import NamedTuple

import numpy as np

from unipic_jax.data.blocks.captions import noun
from unipic_jax.data.blocks.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    PLACES,
    SHAPES,
    Objects,
    scatter,
)

SINGLE = ("recolour", "add", "remove", "replace", "move", "background")
EDIT_KINDS = (*SINGLE, "two_at_once")
MOST_WORDS = 20
WORDINGS = {
    "recolour": ("make {it} {colour}", "turn {it} {colour}",
                 "change the color of {it} to {colour}"),
    "add": ("add {new} in the {place}", "put {new} in the {place}", "draw {new} in the {place}"),
    "remove": ("remove {it}", "delete {it}", "erase {it}"),
    "replace": ("replace {it} with {new}", "change {it} to {new}", "turn {it} into {new}"),
    "move": ("move {it} to the {place}",),
    "background": ("make the background {ground}", "change the background to {ground}",
                   "turn the background {ground}"),
}
_colours, _backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)


def random_objects(rng: np.random.Generator, least: int, most: int) -> Objects:
    """Between `least` and `most` objects of any kind anywhere."""
    number = int(rng.integers(least, most + 1))
    kinds = rng.integers((len(SHAPES), len(COLOURS)), size=(number, 2)).tolist()
    return scatter(rng, [tuple(kind) for kind in kinds])


def names(objects: Objects, cell: int) -> list[str]:
    """What an object may be called so that no other is meant, best known first: by its shape and
    colour, by its shape alone, and always by its place."""
    shape, colour = objects[cell]
    found = []
    if list(objects.values()).count((shape, colour)) == 1:
        found.append(f"the {noun(shape, colour)}")
    if sum(other == shape for other, _ in objects.values()) == 1:
        found.append(f"the {noun(shape)}")
    return [*found, f"the {noun(shape, colour)} in the {PLACES[cell]}"]


class Edit(NamedTuple):
    """An instruction, what it calls the object that it is about, if any, and where it leads."""

    text: str
    name: str | None
    cells: set[int]  # that it changes
    background: int
    objects: Objects


def edit(
    rng: np.random.Generator, kind: str, background: int, objects: Objects
) -> Edit | None:
    """An edit of a scene; None where the draw does not suit it, for the caller to draw again."""
    if kind != "two_at_once":
        return _single(rng, kind, background, objects)
    one, other = (_single(rng, SINGLE[j], background, objects)
                  for j in rng.permutation(len(SINGLE))[:2])
    text = f"{one.text} and {other.text}"
    # Either may be done first: neither undoes what the other calls its object, or touches it.
    if (one.cells & other.cells or len(text.split()) > MOST_WORDS
            or not _still_names(one, other) or not _still_names(other, one)):
        return None
    changed = {cell: other.objects[cell] for cell in other.cells & other.objects.keys()}
    kept = {cell: kind for cell, kind in one.objects.items() if cell not in other.cells}
    background = one.background if one.background != background else other.background
    return Edit(text, None, one.cells | other.cells, background, kept | changed)


def _still_names(one: Edit, other: Edit) -> bool:
    return one.name is None or any(
        one.name in names(other.objects, cell) for cell in one.cells & other.objects.keys())


def _single(rng, kind: str, background: int, objects: Objects) -> Edit:
    cell = list(objects)[rng.integers(len(objects))]
    shape, colour = objects[cell]
    empty = [c for c in range(CELLS) if c not in objects]
    place = empty[rng.integers(len(empty))]
    new = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
    name = names(objects, cell)
    name = name[rng.integers(len(name))]
    after, cells = dict(objects), {cell}
    if kind == "recolour":
        new = after[cell] = shape, _another(rng, colour, len(COLOURS))
    elif kind == "replace":
        new = after[cell] = _another(rng, shape, len(SHAPES)), new[1]
    elif kind == "remove":
        del after[cell]
    elif kind == "add":
        after[place], cells, name = new, {place}, None
    elif kind == "move":
        after[place], cells = after.pop(cell), {cell, place}
    else:
        background = _another(rng, background, len(BACKGROUNDS))
        cells, name = set(), None
    wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
    text = wording.format(it=name, new="a " + noun(*new), colour=_colours[new[1]],
                          place=PLACES[place], ground=_backgrounds[background])
    return Edit(text, name, cells, background, after)


def _another(rng, index: int, number: int) -> int:
    return (index + 1 + int(rng.integers(number - 1))) % number
