"""The prompts of each rollout: a function of the seed and the rollout's number alone.

They are of the blocks world, endless and never twice the same ones; or of a file of JSON lines,
in an order that is drawn anew each time it has been gone through. A line of it has "prompt" and,
for edits, "image", a path from the file's own folder; all else in it is metadata for the reward.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from unipic_jax.core import images
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks, buckets, feed
from unipic_jax.data.blocks import EditGoal, Goal
from unipic_jax.data.records import Example
from unipic_jax.rl.rewards.builtin import goal_metadata
from unipic_jax.train.collate import Collate
from unipic_jax.train.step import Batch


class Prompt(NamedTuple):
    """What is drawn or edited, and what a reward has to know of it besides."""

    example: Example
    metadata: dict
    goal: Goal | EditGoal | None  # of blocks


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Prompts of a task of the blocks world; `prompts[seed, i]` is one."""

    task: str

    def __getitem__(self, at: tuple[int, int]) -> Prompt:
        sample = blocks.sample(self.task, *at)
        stacked = jax.tree.map(lambda a: np.asarray(a)[None], sample.goal)
        return Prompt(sample.example, goal_metadata(stacked)[0], sample.goal)


class File:
    """Prompts of a task in a file of JSON lines; `prompts[seed, i]` is one.

    Raises InputError for a line that is no prompt, or an edit without its picture.
    """

    def __init__(self, path: Path, task: str, side: int):
        self._path, self._task, self._side = path, task, side
        self._order = (None, None)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path} cannot be read: {e}") from None
        self._rows = [self._row(number, line) for number, line in enumerate(lines, 1)
                      if line.strip()]
        if not self._rows:
            raise InputError(f"{path} has no prompts")

    def _row(self, number, line) -> tuple[str, str, Path | None, dict]:
        place = f"{self._path.name}:{number}"
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            raise InputError(f"{place} is not a JSON object") from None
        text, image = row.pop("prompt", None), row.pop("image", None)
        if not isinstance(text, str):
            raise InputError(f'{place} has no "prompt"')
        if self._task == "edit" and not isinstance(image, str):
            raise InputError(f'{place} has no "image" to edit')
        source = self._path.parent / image if self._task == "edit" else None
        if source and not source.is_file():
            raise InputError(f"{place}: its image {source} is missing")
        return place, text, source, row

    def __getitem__(self, at: tuple[int, int]) -> Prompt:
        (seed, i), n = at, len(self._rows)
        time, position = divmod(i, n)
        if self._order[0] != (seed, time):
            order = np.random.default_rng([seed, time]).permutation(n)
            self._order = (seed, time), order
        name, text, source, metadata = self._rows[self._order[1][position]]
        if source is not None:
            source = buckets.fit(np.asarray(images.open_picture(source)), (self._side, self._side))
        return Prompt(Example(name, text, source=source), metadata, None)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of every rollout, as the arrays that `rl.recipe`'s step takes. Of several tasks
    each rollout has one, in turn."""

    sources: Mapping[str, Blocks | File]  # by task
    collate: Mapping[str, Collate]
    count: int  # a rollout
    mesh: jax.sharding.Mesh
    ask: Callable[[list[Example]], dict] | None = None  # what a judge is asked, as arrays
    copies: int = 1  # rows of each, one after the other
    kept: Blocks | File | None = None  # edits besides, for `learn.Config.keep`
    kept_count: int = 0

    def task(self, number: int) -> str:
        """That of a rollout."""
        return list(self.sources)[number % len(self.sources)]

    def of(self, seed: int, number: int) -> list[Prompt]:
        """The prompts of a rollout."""
        source, first = self.sources[self.task(number)], number // len(self.sources) * self.count
        return [source[seed, first + i] for i in range(self.count)]

    def __call__(self, seed: int, start: int = 0) -> Iterator[tuple[str, Batch]]:
        """This host's part of those of rollout `start` and of all after it."""
        while True:
            task, drawn = self.task(start), self.of(seed, start)
            examples = [p.example for p in drawn]
            whole = self._collated(task, examples)
            if self.ask and task == "edit":
                whole["judge"] = self.ask(examples)
            if drawn[0].goal is not None:
                whole["goal"] = jax.tree.map(lambda *a: np.stack(a), *(p.goal for p in drawn))
            whole = jax.tree.map(lambda a: np.repeat(a, self.copies, 0), whole)
            local = feed.local_rows(self.mesh, whole, self.count * self.copies)
            if self.kept:
                first = start * self.kept_count
                kept = [self.kept[seed, first + i].example for i in range(self.kept_count)]
                local["kept"] = feed.local_rows(self.mesh, self._collated("edit", kept),
                                                self.kept_count)
            yield task, local
            start += 1

    def _collated(self, task: str, examples: list[Example]) -> Batch:
        collate = self.collate[task]
        blank = [dataclasses.replace(e, text="") for e in examples]
        whole = collate(examples) | {"negative": collate(blank)["prompt"]}
        whole.pop("target", None)
        return whole
