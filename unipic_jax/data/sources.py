"""Random access to examples, wherever they are."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from unipic_jax.core.errors import InputError
from unipic_jax.data.records import TASKS, Example


class Source(Protocol):
    """A sequence of examples; `tasks` and `sizes` tell what is in it without decoding it all."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Example i; BadRecord where it is damaged, its name begins the message."""

    def tasks(self) -> np.ndarray:
        """uint8 [N], positions in `TASKS`."""

    def sizes(self) -> np.ndarray:
        """int32 [N, 2], width and height of the target, or of the picture that is asked about."""


def _kind(example: Example) -> tuple[int, tuple[int, int]]:
    picture = example.source if example.target is None else example.target
    return TASKS.index(example.task), picture.shape[1::-1]


class InMemory:
    """Examples in a list."""

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name, self._examples = name, examples

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, i):
        return self._examples[i]

    def tasks(self):
        return np.array([_kind(e)[0] for e in self._examples], np.uint8)

    def sizes(self):
        return np.array([_kind(e)[1] for e in self._examples], np.int32).reshape(-1, 2)


class Procedural(InMemory):
    """Examples that are made on demand, all of one task and size."""

    def tasks(self):
        return np.full(len(self), _kind(self[0])[0], np.uint8)

    def sizes(self):
        return np.full((len(self), 2), _kind(self[0])[1], np.int32)


def open_source(spec) -> Source:
    """The source that a configuration names; InputError where it cannot be opened.

    {"kind": "blocks", "task", "seed", "length"}.
    """
    spec = dict(spec)
    kind = spec.pop("kind", None)
    if kind == "blocks":
        from unipic_jax.data import blocks
        return Procedural(f"blocks/{spec['task']}", blocks.source(**spec))
    raise InputError(f"the data source kind {kind!r} is unknown; use blocks, shards or tfds")
