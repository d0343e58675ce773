"""The examples of the blocks world: endless, and each a function of (seed, task, index) alone.

Held out for evaluation is 1 in 16 of the scenes, by a hash: no training example has one as its
picture, source or target, and every evaluation example has only such. Of the captions that name
two coloured shapes, 1 in 16 pairs is held out in the same way. One in two training captions of
one or two objects say all that is in their picture, places too, as captions for pre-training do,
and of these more have two.
One in two training questions is none but a caption or an instruction, whose answer describes what
it asks for, or what it changes: a language model is to know what to draw. Where there is a
picture, training goes on to ask about it (`Example.turns`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unipic_jax.core.errors import InputError
from unipic_jax.data.blocks import captions, edits, questions
from unipic_jax.data.blocks.captions import Goal
from unipic_jax.data.blocks.scenes import (
    BACKGROUNDS,
    EMPTY,
    Scene,
    draw,
    is_held_out,
    is_held_out_pair,
    scene,
)
from unipic_jax.data.records import TASKS, Example

KINDS = dict(zip(TASKS, (captions.GENERATION_KINDS, edits.EDIT_KINDS, questions.QUESTION_KINDS)))
"""The kinds of the examples of each task."""
HARDER = ("place", "place", "relation", "relation")  # questions, asked so much oftener in training
TURNS = 6  # at most, after the first question
TRIES = 8  # at the edits of one scene, of which there may be few


class EditGoal(NamedTuple):
    """What an edit starts from and what it has to lead to, of one edit or of a batch."""

    source: Scene
    target: Scene


class Sample(NamedTuple):
    """An example, its kind, and what its score needs, which for a question is its answer alone."""

    example: Example
    kind: str
    goal: Goal | EditGoal | Scene | None


class Evaluation(NamedTuple):
    """N samples as arrays, as many of each kind, kind after kind; None is what a task has not."""

    kind: np.ndarray  # int32 [N], by index into KINDS[task]
    text: tuple[str, ...]
    source: np.ndarray | None  # uint8 [N, 48, 48, 3]
    target: np.ndarray | None  # uint8 [N, 48, 48, 3]
    answer: tuple[str, ...] | None
    goal: Goal | EditGoal | None  # arrays with a leading N


def sample(
    task: str, seed: int, index: int, *, kind: str | None = None, held_out: bool = False
) -> Sample:
    """Sample `index` of a task (one of records.TASKS), of a kind that is drawn too where it is
    not given; `held_out` takes it from the held-out scenes instead of from the others."""
    stream = 1 + KINDS[task].index(kind) if kind else 0
    rng = np.random.Generator(np.random.Philox(
        key=seed, counter=[0, 2 * stream + held_out, index, TASKS.index(task)]))
    name = f"blocks/{task}/{seed}/{index}"
    if held_out or kind:
        name = f"blocks/{task}/{'held out' if held_out else 'training'}/{kind}/{seed}/{index}"
    if task == "describe" and not kind:
        return _chat(rng, name)
    kind = kind or KINDS[task][rng.integers(len(KINDS[task]))]
    make = {"generate": _generation, "edit": _edit, "describe": _question}[task]
    return make(rng, name, kind, held_out)


def _generation(rng, name, kind, held_out) -> Sample:
    text, goal, drawn, _ = _captioned(rng, kind, held_out)
    return Sample(Example(name, text, target=draw(drawn)), kind, goal)


def _captioned(rng, kind, held_out) -> tuple[str, Goal, Scene, Scene]:
    """A caption, its goal, a scene, and what the caption says of that, with -1 for all else."""
    while True:
        text, goal, background, objects = captions.caption(rng, kind)
        if kind == "colour_to_object" and is_held_out_pair(objects) != held_out:
            continue
        full = False
        if held_out and kind == "colour_to_object":  # of whose pairs few have a held-out pose
            placed = captions.arrange(rng, goal, objects)
        elif held_out or len(objects) > captions.MOST_DESCRIBED or rng.integers(2):
            placed = captions.pose(goal, objects)
        else:
            if len(objects) == 1 and rng.integers(2):
                goal, objects = captions.joined(rng, goal, objects)
            placed = captions.arrange(rng, goal, objects)
            order = rng.permutation(list(placed)).tolist()
            if len(order) == 2 and is_held_out_pair([placed[c] for c in order]):
                continue
            text = captions.description(rng, background, placed, order)
            full = True
        drawn = scene(background, placed)
        if is_held_out(drawn) == held_out:
            return text, goal, drawn, drawn if full else _told(goal, drawn)


def _told(goal, drawn) -> Scene:
    """A scene without the colours and the background that its caption does not name."""
    first = drawn.shape == goal.shape[0]
    colour = np.where(first, goal.colour[0], goal.colour[1])
    return Scene(goal.background, drawn.shape, np.where(drawn.shape < 0, EMPTY, colour))


def _edit(rng, name, kind, held_out) -> Sample:
    while True:
        background, objects = _ground(rng), edits.random_objects(rng, 2, 4)
        source = scene(background, objects)
        if is_held_out(source) != held_out:
            continue
        for _ in range(TRIES):
            edit = edits.edit(rng, kind, background, objects)
            target = edit and scene(edit.background, edit.objects)
            if edit and is_held_out(target) == held_out:
                example = Example(name, edit.text, target=draw(target), source=draw(source))
                return Sample(example, kind, EditGoal(source, target))


def _question(rng, name, kind, held_out) -> Sample:
    while True:
        background, objects = _ground(rng), edits.random_objects(rng, 1, 4)
        shown = scene(background, objects)
        asked = is_held_out(shown) == held_out and questions.question(
            rng, kind, background, objects)
        if asked:
            text, answer = asked
            return Sample(Example(name, text, source=draw(shown), answer=answer), kind, shown)


def _chat(rng, name) -> Sample:
    """A caption, answered by what is to be drawn; or an instruction, answered by what changes, or
    a question, and more questions about the picture after them."""
    first = rng.integers(6)
    if first == 0:
        kind = captions.GENERATION_KINDS[rng.integers(len(captions.GENERATION_KINDS))]
        text, _, drawn, wanted = _captioned(rng, kind, False)
        answer = questions.description(wanted)
        return Sample(Example(name, text, target=draw(drawn), answer=answer), kind, None)
    if first <= 2:
        made = _edit(rng, name, edits.EDIT_KINDS[rng.integers(len(edits.EDIT_KINDS))], False)
        shown, answer = made.goal.source, questions.change(*made.goal)
    else:
        made = _question(rng, name, _question_kind(rng), False)
        shown, answer = made.goal, made.example.answer
    example = dataclasses.replace(made.example, answer=answer, turns=_turns(rng, shown))
    return Sample(example, made.kind, None)


def _turns(rng, shown: Scene) -> tuple[tuple[str, str], ...]:
    objects = {int(c): (int(shown.shape[c]), int(shown.colour[c]))
               for c in np.flatnonzero(shown.shape >= 0)}
    asked = (questions.question(rng, _question_kind(rng), int(shown.background), objects)
             for _ in range(TURNS))
    return tuple(filter(None, asked))


def _question_kind(rng) -> str:
    kinds = questions.QUESTION_KINDS + HARDER
    return kinds[rng.integers(len(kinds))]


def _ground(rng) -> int:
    return int(rng.integers(len(BACKGROUNDS)))


def generation(seed: int, index: int, **options) -> Sample:
    """A caption and a picture; see `sample`, also for the options."""
    return sample("generate", seed, index, **options)


def edit(seed: int, index: int, **options) -> Sample:
    """A picture, an instruction and the edited picture; see `sample`, also for the options."""
    return sample("edit", seed, index, **options)


def question(seed: int, index: int, **options) -> Sample:
    """A picture, a question and its answer; see `sample`, also for the options."""
    return sample("describe", seed, index, **options)


@dataclasses.dataclass(frozen=True)
class Source(Sequence):
    """The first `length` training examples of a task and a seed, for random access."""

    task: str
    seed: int
    length: int

    def __post_init__(self):
        if self.task not in TASKS:
            raise InputError(f"the task {self.task!r} of blocks is not known; known are "
                             f"{', '.join(TASKS)}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return sample(self.task, self.seed, int(index)).example


def evaluation(task: str, per_kind: int, seed: int = 0) -> Evaluation:
    """Held-out samples, `per_kind` of each kind of the task."""
    kinds = KINDS[task]
    samples = [sample(task, seed, i, kind=kind, held_out=True)
               for kind in kinds for i in range(per_kind)]
    examples = [s.example for s in samples]

    def pictures(all_of):
        return None if all_of[0] is None else np.stack(all_of)

    return Evaluation(
        np.repeat(np.arange(len(kinds), dtype=np.int32), per_kind),
        tuple(e.text for e in examples), pictures([e.source for e in examples]),
        pictures([e.target for e in examples]),
        None if examples[0].answer is None else tuple(e.answer for e in examples),
        _stack([s.goal for s in samples]))


def _stack(goals):
    """Tuples of arrays, or of such tuples, to one of stacked arrays."""
    if not isinstance(goals[0], tuple):
        return None if goals[0] is None else np.stack(goals)
    return type(goals[0])(*map(_stack, zip(*goals)))
