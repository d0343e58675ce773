"""Parameters on disk, as one Orbax checkpoint a part.

Trees are written and read a few leaves at a time where they need not fit in memory, and restored
whole onto any mesh.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath

import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree

Path = tuple[str, ...]
GROUP = 2**28  # bytes that are held at a time, or one leaf where it is larger
CHUNK = 2**26  # bytes a stored chunk at most, so that a host reads little more than its share


def save(folder: FilePath, leaves: Iterable[tuple[Path, np.ndarray]]) -> None:
    """Write leaves as they come; the checkpoint is valid once the last one is in."""
    folder = folder.absolute()  # Orbax takes no other
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    # Weights hardly compress (by a third in bfloat16), and a processor does it slower than a disk
    # takes them.
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False  # nobody changes a leaf while it is written
    with context:
        group, held = {}, 0
        for path, array in leaves:
            group[path], held = array, held + array.nbytes
            del array  # not a second reference while the next leaf is made
            if held > GROUP:
                ocp.partial.save(folder, traverse_util.unflatten_dict(group))
                group, held = {}, 0
        if group:
            ocp.partial.save(folder, traverse_util.unflatten_dict(group))
        ocp.partial.finalize(folder)


def described(folder: FilePath) -> dict[Path, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every leaf. Raises InputError where `folder` is not a checkpoint."""
    try:
        tree = ocp.metadata(folder.absolute()).metadata
        if tree is None:
            raise ValueError("it holds no tree")
    except Exception as e:  # Orbax raises many kinds for a folder that is not whole
        raise InputError(f"{folder} is not a checkpoint that Orbax can open: "
                         f"{str(e).splitlines()[0]}") from None
    return {p: (tuple(m.shape), np.dtype(m.dtype))
            for p, m in traverse_util.flatten_dict(tree).items()}


def leaves(folder: FilePath) -> Iterator[tuple[Path, np.ndarray]]:
    """Every leaf on the host, a few at a time."""
    all_leaves = described(folder)
    nothing = {p: ocp.PLACEHOLDER for p in all_leaves}
    group, held = {}, 0

    def load():
        wanted = {p: np.empty(*all_leaves[p]) for p in group}
        tree = _load(folder, traverse_util.unflatten_dict(nothing | wanted))
        loaded = traverse_util.flatten_dict(tree)
        return {p: loaded[p] for p in group}

    for path, (shape, dtype) in all_leaves.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if group and held + size > GROUP:
            yield from load().items()
            group, held = {}, 0
        group[path], held = None, held + size
    yield from load().items()


def restore(folder: FilePath, abstract: Tree) -> Tree:
    """The tree with the shapes, types and shardings of `abstract`."""
    return _load(folder, abstract)


def _load(folder, tree):
    try:
        return ocp.load(folder.absolute(), tree)
    except Exception as e:
        raise InputError(f"{folder} cannot be restored: {str(e).splitlines()[0]}") from e
