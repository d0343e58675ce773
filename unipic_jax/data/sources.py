"""Random access to examples, wherever they are."""

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from unipic_jax.core.errors import InputError
from unipic_jax.data import records
from unipic_jax.data.records import TASKS, BadRecord, Example, Record
from unipic_jax.data.shards import Shards

FIELDS = ("name", "target", "source", "text", "answer")
NO_TASK = 255

log = logging.getLogger(__name__)


class Source(Protocol):
    """A sequence of examples; `tasks` and `sizes` tell what is in it without decoding it."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Example i; BadRecord where it is damaged."""

    def record(self, i: int) -> Record:
        """Example i as it is stored; BadRecord where it is damaged."""

    def tasks(self) -> np.ndarray:
        """uint8 [N], positions in `TASKS`; `NO_TASK` for a record that is known to be bad."""

    def sizes(self) -> np.ndarray:
        """int32 [N, 2], width and height of the target, or of the picture that is asked about."""


class InMemory:
    """Examples in a list."""

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name, self._examples = name, examples

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, i):
        return self._examples[i]

    def record(self, i):
        return records.to_record(self[i])

    def tasks(self):
        return np.array([TASKS.index(e.task) for e in self._examples], np.uint8)

    def sizes(self):
        return np.array([_size(e) for e in self._examples], np.int32).reshape(-1, 2)


class Procedural(InMemory):
    """Examples that are made on demand, all of one task and size."""

    def tasks(self):
        return np.full(len(self), TASKS.index(self[0].task), np.uint8)

    def sizes(self):
        return np.full((len(self), 2), _size(self[0]), np.int32)


def _size(example: Example) -> tuple[int, int]:
    return (example.source if example.target is None else example.target).shape[1::-1]


class Tfds:
    """A TensorFlow data set that lies prepared, as ArrayRecord, in `data_dir`.

    features: for each of our fields the feature it is in, `captions/text` for one inside another;
    of several captions the first is taken. By default the fields of `tfds_builder`. Raises
    InputError where the data set, the split or a feature is not there.
    """

    def __init__(self, name: str, split: str, data_dir: str | None = None,
                 features: Mapping[str, str] | None = None):
        import tensorflow_datasets as tfds
        try:
            self._data = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        except Exception as e:  # TFDS raises many kinds, some with pages of names
            raise InputError(f"the data set {name}, split {split}, cannot be opened in "
                             f"{data_dir or 'the TFDS folder'}: {str(e).splitlines()[0]}; prepare "
                             f"it with `tfds build {name} --file_format=array_record`") from None
        self.name = f"{name}/{split}"
        self._info = self._data.dataset_info.features
        self._features = dict(features or {f: f for f in FIELDS})
        if unknown := self._features.keys() - set(FIELDS):
            raise InputError(f"{name}: {unknown.pop()!r} is not one of {', '.join(FIELDS)}")
        for feature in self._features.values():
            if feature.split("/")[0] not in self._info:
                raise InputError(f"{name} has no feature {feature!r} but {', '.join(self._info)}; "
                                 "name the ones to use in `features`")
        # Pictures stay files, which are decoded by the same rules as all others.
        self._data.decoders = {k: tfds.decode.SkipDecoding() for k, f in self._info.items()
                               if isinstance(f, tfds.features.Image)}

    def __len__(self):
        return len(self._data)

    def record(self, i: int) -> Record:
        try:
            row = self._data[i]
        except Exception as e:  # of ArrayRecord, of protocol buffers or of a decoder
            raise BadRecord(f"it cannot be read: {e}") from None
        fields = {field: self._value(row, feature) for field, feature in self._features.items()}
        for field, value in fields.items():
            if isinstance(value, bytes) and field not in ("target", "source"):
                fields[field] = value = value.decode(errors="replace")
            if isinstance(value, bytes | str) and not value and field != "text":
                fields[field] = None
        record = Record(**{"name": f"{self.name}[{i}]", "text": ""} | fields)
        records.check(record)
        return record

    def _value(self, row, feature: str):
        first, *rest = feature.split("/")
        value, info = row[first], self._info[first]
        for part in rest:
            value, info = value[part], info[part]
        if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == "O"):
            value = value[0] if len(value) else b""
        return info.int2str(value) if hasattr(info, "int2str") else value

    def __getitem__(self, i):
        return records.to_example(self.record(i))

    @functools.cached_property
    def _index(self):
        log.info("%s: reading %d records for their sizes; import the data set to shards to do so "
                 "once only", self.name, len(self))
        tasks = np.full(len(self), NO_TASK, np.uint8)
        sizes = np.ones((len(self), 2), np.int32)
        for i in range(len(self)):
            try:
                record = self.record(i)
                sizes[i] = records.size(record.picture, "picture")
                tasks[i] = TASKS.index(record.task)
            except BadRecord as e:
                log.warning("bad record is left out: %s, record %d: %s", self.name, i, e)
        return tasks, sizes

    def tasks(self):
        return self._index[0]

    def sizes(self):
        return self._index[1]


def _blocks(task: str, seed: int, length: int) -> Procedural:
    from unipic_jax.data import blocks
    return Procedural(f"blocks/{task}", blocks.Source(task, seed, length))


KINDS = {"blocks": _blocks, "shards": Shards, "tfds": Tfds}


def open_source(spec: Mapping) -> Source:
    """The source that a configuration names; InputError where it cannot be opened.

    {"kind": "blocks", "task", "seed", "length"}, {"kind": "shards", "path"} or
    {"kind": "tfds", "name", "split"} with, for a data set not of ours, "data_dir" and "features".
    """
    spec = dict(spec)
    kind = spec.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"the kind of data {kind!r} is unknown; use {', '.join(KINDS)}")
    try:
        inspect.signature(KINDS[kind]).bind(**spec)
    except TypeError as e:
        raise InputError(f"the data source of kind {kind!r} cannot be opened: {e}") from None
    return KINDS[kind](**spec)
