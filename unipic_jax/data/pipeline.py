"""Batches for training, of which the one at step k is a pure function of the seed and k.

Whatever the number of hosts, a global batch holds the same rows in the same order, and host p of n
takes the p-th n-th of them; so a run that is resumed, on more or fewer hosts, goes on with
exactly the data that it would have seen.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np
from absl import flags

from unipic_jax.core.errors import InputError
from unipic_jax.data import buckets
from unipic_jax.data.records import PICTURE_CACHES, TASKS, TEXT_CACHES, BadRecord, Example
from unipic_jax.data.sources import Source

TRIES = 100  # bad records in a row after which a source is given up
THREADS = 4  # batches that are made at a time in a process
AHEAD = 4  # batches that wait in a process

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Collate = Callable[[list[Example]], Arrays]


def batches(
    sources: Sequence[tuple[Source, float]],
    collate: Mapping[str, Collate],
    *,
    batch: int,
    sizes: Sequence[buckets.Size],
    seed: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    caption_dropout: float = 0.0,
    workers: int = 0,
) -> "Batches":
    """This host's rows of the global batches of `batch` rows, from step `start` on, without end.

    sources: each with its share of the batches; a batch is of one source, task and size.
    collate: for each task, what makes arrays [batch / hosts, ...] of examples whose pictures are
    all of the batch's size. Examples of other tasks are left out.
    sizes: the buckets, see `buckets.sizes`.
    caption_dropout: the part of the captions, of task "generate", that become "".
    workers: processes that decode; 0 for threads of this one.
    Raises InputError where there is nothing to learn from, or a batch does not divide.
    """
    if batch % hosts:
        raise InputError(f"a batch of {batch} does not divide over {hosts} hosts")
    if any(not weight > 0 for _, weight in sources):
        raise InputError("every data source needs a weight above 0; remove those without")
    mixed, weights = [], []
    for number, (source, weight) in enumerate(sources):
        parts = [
            _part(source, task, size, members, batch=batch, host=host, hosts=hosts,
                  seeds=np.random.SeedSequence([seed, number, TASKS.index(task), *size]),
                  dropout=caption_dropout if task == "generate" else 0.0, collate=collate[task])
            for task, size, members in _groups(source, tuple(sizes), collate)]
        if parts:
            mixed.append(grain.MapDataset.mix(*zip(*parts)))
            weights.append(weight)
    if not mixed:
        names = ", ".join(source.name for source, _ in sources)
        raise InputError(f"no records to {' or '.join(collate)} in {names or 'no data source'}")
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    dataset = grain.MapDataset.mix(mixed, weights).slice(slice(start, None))
    dataset = dataset.to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask for flags that nobody passes here
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Batches(iter(dataset))


class Batches:
    """Endless (task, arrays). Each bad record met is logged once and kept in `bad`."""

    def __init__(self, iterator):
        self._iterator = iterator
        self.bad: dict[str, str] = {}  # the record's place -> what is wrong with it

    def __iter__(self):
        return self

    def __next__(self) -> tuple[str, Arrays]:
        task, arrays, bad = next(self._iterator)
        for place, why in bad.items():
            if place not in self.bad:
                self.bad[place] = why
                log.warning("bad record %d is replaced: %s: %s", len(self.bad), place, why)
        return task, arrays

    def close(self) -> None:
        """End the processes that decode."""
        self._iterator.close()


def _groups(source: Source, sizes: tuple[buckets.Size, ...], collate):
    """(task, size, records) of what is in a source; what is left out goes to the log."""
    tasks = source.tasks()
    place = buckets.nearest(source.sizes(), sizes) if len(sizes) > 1 else np.zeros_like(tasks)
    for number, task in enumerate(TASKS):
        mine = tasks == number
        if not mine.any():
            continue
        if task not in collate:
            log.info("%s: %d records to %s are left out", source.name, mine.sum(), task)
            continue
        for bucket, size in enumerate(sizes):
            members = np.flatnonzero(mine & (place == bucket))
            if len(members):
                # A range is nothing to send to the processes that decode.
                whole = len(members) == len(source)
                yield task, size, range(len(source)) if whole else members
            else:
                log.info("%s: no records to %s at %dx%d; the bucket is left out",
                         source.name, task, *size)


def _part(source, task, size, members, *, batch, host, hosts, seeds, dropout, collate):
    """The endless batches of one task and size of a source, and the number of its records."""
    shuffle, drop = (int(s) for s in seeds.generate_state(2))
    examples = grain.MapDataset.source(range(len(members))).shuffle(seed=shuffle).repeat()
    examples = examples.map(_Read(source, members, size))
    if dropout:  # before the rows are shared out, so that what is drawn is the global row's
        examples = examples.random_map(_DropCaption(dropout), seed=drop)
    examples = HostRows(examples, batch, host, batch // hosts)
    return examples.batch(batch // hosts, batch_fn=_Collate(task, collate)), float(len(members))


class HostRows(grain.MapDataset):
    """Rows `host * rows` to `(host + 1) * rows` of every `batch` rows."""

    def __init__(self, parent: grain.MapDataset, batch: int, host: int, rows: int):
        super().__init__(parent)
        self._batch, self._host, self._rows = batch, host, rows

    def __len__(self):
        return len(self._parent) // self._batch * self._rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        return self._parent[step * self._batch + self._host * self._rows + row]


@dataclasses.dataclass(frozen=True)
class _Read:
    """The example at a position among the members, at the bucket's size, and the bad ones that it
    stands for: a bad record gives way to the next member."""

    source: Source
    members: Sequence[int]
    size: buckets.Size

    def __call__(self, position: int) -> tuple[Example, dict[str, str]]:
        bad = {}
        for offset in range(min(TRIES, len(self.members))):
            record = int(self.members[(position + offset) % len(self.members)])
            try:
                return fit(self.source[record], self.size), bad
            except BadRecord as e:
                bad[f"{self.source.name}, record {record}"] = str(e)
        place, why = next(iter(bad.items()))
        raise InputError(f"{len(bad)} bad records in a row, the first being {place}: {why}; "
                         "write the data again")


def fit(example: Example, size: buckets.Size) -> Example:
    """The example with its pictures scaled to cover a size and cut to it."""
    pictures = {k: p for k in ("target", "source") if (p := getattr(example, k)) is not None}
    if all(p.shape[1::-1] == size for p in pictures.values()):
        return example
    cached = {k: a for k, a in example.cached.items() if k not in PICTURE_CACHES}
    pictures = {k: buckets.fit(p, size) for k, p in pictures.items()}
    return dataclasses.replace(example, **pictures, cached=cached)


@dataclasses.dataclass(frozen=True)
class _DropCaption:
    probability: float

    def __call__(self, read, rng: np.random.Generator):
        if rng.random() >= self.probability:
            return read
        example, bad = read
        cached = {k: a for k, a in example.cached.items() if k not in TEXT_CACHES}
        return dataclasses.replace(example, text="", cached=cached), bad


@dataclasses.dataclass(frozen=True)
class _Collate:
    task: str
    collate: Collate

    def __call__(self, reads):
        bad = {place: why for _, worse in reads for place, why in worse.items()}
        return self.task, self.collate([example for example, _ in reads]), bad
