"""Parameters on disk, as one Orbax checkpoint a part.

Trees are written and read a few leaves at a time where they need not fit in memory, and restored
whole onto any mesh. A stack that is larger than `GROUP` lies in several arrays of some layers
each, "part_0" and so on by the first layer, so that memory does not grow with depth.
"""

import contextlib
import ctypes
import math
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from orbax.checkpoint import v1 as ocp

from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree

Path = tuple[str, ...]
GROUP = 2**28  # bytes that are held at a time, or one leaf or layer where it is larger
CHUNK = 2**26  # bytes a stored chunk at most, so that a host reads little more than its share
PART = "part_"


class Piece(NamedTuple):
    """A leaf, or the layers of a stack from `first` on."""

    path: Path
    array: np.ndarray
    first: int | None = None  # None for a whole leaf


def layers_apiece(layer_bytes: int, layers: int) -> int:
    """How many layers of a stack go into a piece: all, or as many as `GROUP` holds."""
    return layers if layer_bytes * layers <= GROUP else max(1, GROUP // layer_bytes)


def save(folder: FilePath, pieces: Iterable[Piece]) -> None:
    """Write pieces as they come; the checkpoint is valid once the last one is in."""
    folder = folder.absolute()  # Orbax takes no other
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    # Weights hardly compress (by a third in bfloat16), and a processor does it slower than a disk
    # takes them.
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False  # nobody changes a leaf while it is written
    group = {}

    def flush():
        if group:
            ocp.partial.save(folder, traverse_util.unflatten_dict(group))
            group.clear()

    with context:
        for path, array, first in pieces:
            if sum(a.nbytes for a in group.values()) + array.nbytes > GROUP:
                flush()
            group[path if first is None else (*path, f"{PART}{first}")] = array
            if array.nbytes > GROUP:
                flush()  # now, since the next leaf would be made beside it
            del array
        flush()
        ocp.partial.finalize(folder)


def _stored(folder: FilePath) -> dict[Path, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every stored array."""
    try:
        tree = ocp.metadata(folder.absolute()).metadata
        if tree is None:
            raise ValueError("it holds no tree")
    except Exception as e:  # Orbax raises many kinds for a folder that is not whole
        raise InputError(f"{folder} is not a checkpoint that Orbax can open: "
                         f"{str(e).splitlines()[0]}") from None
    return {p: (tuple(m.shape), np.dtype(m.dtype))
            for p, m in traverse_util.flatten_dict(tree).items()}


def _whole(path: Path) -> tuple[Path, int | None]:
    """The leaf that a stored array belongs to, and its first layer where it is a piece."""
    if path[-1].startswith(PART):
        return path[:-1], int(path[-1].removeprefix(PART))
    return path, None


def described(folder: FilePath) -> dict[Path, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every leaf. Raises InputError where `folder` is not a checkpoint."""
    leaves = {}
    for stored, (shape, dtype) in _stored(folder).items():
        path, first = _whole(stored)
        if first is not None and path in leaves:
            shape = (shape[0] + leaves[path][0][0], *shape[1:])
        leaves[path] = shape, dtype
    return leaves


def pieces(folder: FilePath) -> Iterator[Piece]:
    """Everything on the host, a few pieces at a time."""
    stored = _stored(folder)
    nothing = dict.fromkeys(stored, ocp.PLACEHOLDER)
    for group in _groups(stored):
        wanted = {p: np.empty(*stored[p]) for p in group}
        loaded = traverse_util.flatten_dict(
            _load(folder, traverse_util.unflatten_dict(nothing | wanted)))
        del wanted
        for p in group:
            path, first = _whole(p)
            yield Piece(path, loaded.pop(p), first)


def _groups(stored: dict[Path, tuple[tuple[int, ...], np.dtype]]) -> Iterator[list[Path]]:
    """Stored arrays in groups of `GROUP` bytes, or one array where it is larger."""
    group, held = [], 0
    for path, (shape, dtype) in stored.items():
        size = math.prod(shape) * dtype.itemsize
        if group and held + size > GROUP:
            yield group
            group, held = [], 0
        group, held = [*group, path], held + size
    if group:
        yield group


def restore(folder: FilePath, abstract: Tree) -> Tree:
    """The tree with the shapes, types and shardings of `abstract`."""
    leaves, stored = traverse_util.flatten_dict(abstract), _stored(folder)
    split: dict[Path, dict[int, Path]] = {}
    for path in stored:
        leaf, first = _whole(path)
        if first is not None:
            split.setdefault(leaf, {})[first] = path
    nothing = dict.fromkeys(stored, ocp.PLACEHOLDER)

    def load(paths):
        wanted = {}
        for path in paths:
            leaf = leaves[_whole(path)[0]]
            wanted[path] = jax.ShapeDtypeStruct(stored[path][0], leaf.dtype,
                                                sharding=leaf.sharding)
        loaded = traverse_util.flatten_dict(
            _load(folder, traverse_util.unflatten_dict(nothing | wanted)))
        return [loaded[path] for path in paths]

    # A stack is there twice while its parts are put together: the largest first, while little
    # else is there.
    tree = {}
    for leaf in sorted(split, key=lambda p: leaves[p].size, reverse=True):
        together = jax.jit(_together, out_shardings=leaves[leaf].sharding)
        # Its parts have no name here, which would keep them while the next one is read.
        tree[leaf] = jax.block_until_ready(
            together(load([path for _, path in sorted(split[leaf].items())])))
        _give_back()
    for group in _groups({p: s for p, s in stored.items() if _whole(p)[1] is None}):
        tree.update(zip(group, load(group)))
        _give_back()
    return traverse_util.unflatten_dict(tree)


def _give_back():
    """Freed memory to the host, which glibc keeps for long in each thread's own heap; others give
    it back by themselves."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _together(parts):
    """As bits: a CPU would put bfloat16 together in float32, in four times the stack's memory."""
    bits = [lax.bitcast_convert_type(p, f"uint{8 * p.dtype.itemsize}") for p in parts]
    return lax.bitcast_convert_type(jnp.concatenate(bits), parts[0].dtype)


def _load(folder, tree):
    context, wanted = ocp.Context(), [a for a in jax.tree.leaves(tree) if hasattr(a, "shape")]
    # What is read and not yet in its place; Orbax takes no array of as many bytes or more.
    largest = max((a.size * a.dtype.itemsize for a in wanted), default=0)
    context.memory.read_concurrent_bytes = max(2 * GROUP, largest + 1)
    try:
        with context:
            return ocp.load(folder.absolute(), tree)
    except Exception as e:
        raise InputError(f"{folder} cannot be restored: {str(e).splitlines()[0]}") from e
