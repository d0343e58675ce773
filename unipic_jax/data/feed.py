"""Batches from the host to the devices of a mesh."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree

DEPTH = 2  # batches on the devices at a time, the one in use included


def to_device(mesh, arrays: Tree) -> Tree:
    """The global arrays of which each host gives its rows, their leading axis the batch."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(
        meshes.batch_sharding(mesh, a.ndim), a), arrays)


def local_rows(mesh, arrays: Tree, batch: int) -> Tree:
    """This host's rows of arrays that every host has whole."""
    host, hosts = share(mesh, batch)
    rows = batch // hosts
    return jax.tree.map(lambda a: a[host * rows:(host + 1) * rows], arrays)


def prefetch(mesh, batches: Iterable) -> Iterator[tuple[str, Tree]]:
    """(task, arrays) on the devices, copied while the step before runs."""
    placed = ((task, to_device(mesh, arrays)) for task, arrays in batches)
    waiting = collections.deque(itertools.islice(placed, DEPTH - 1))
    for item in placed:
        waiting.append(item)
        yield waiting.popleft()
    yield from waiting


def share(mesh, batch: int) -> tuple[int, int]:
    """Which part of how many of a global batch this process gives: `host` and `hosts` of
    `pipeline.batches`.

    Processes that a model is split over give the same part. Raises InputError where the batch does
    not divide over the devices, or the mesh lays the rows of a process apart.
    """
    over = meshes.batch_sharding(mesh, 1)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts:
        raise InputError(f"a batch of {batch} does not divide over {parts} devices; use "
                         f"{max(batch // parts, 1) * parts}")
    return _share([s.indices(batch)[:2] for (s,) in over.addressable_devices_indices_map(
        (batch,)).values()], batch)


def _share(spans: Sequence[tuple[int, int]], batch: int) -> tuple[int, int]:
    spans = sorted(set(spans))
    begin, rows = spans[0][0], sum(stop - start for start, stop in spans)
    if spans[-1][1] - begin != rows or begin % rows or batch % rows:
        raise InputError(f"this process has rows {spans} of a batch of {batch}, which are not one "
                         "even part of it; choose a mesh with whole processes along data and fsdp")
    return begin // rows, batch // rows
