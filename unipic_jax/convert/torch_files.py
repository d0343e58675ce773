"""Tensors in the files of a PyTorch release: safetensors, one file or an index and shards.

safetensors is read and written here by offset, a tensor at a time, so that a checkpoint never
has to fit in memory and its header is checked before anything is allocated.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from unipic_jax.core.config import read_json
from unipic_jax.core.errors import InputError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}
PIECE, BAND = 2**19, 64  # bytes and values that are rearranged at a time, for the cache
DEFAULT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
MAX_HEADER = 100_000_000  # the format's own limit, in bytes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its type by the format's name, its shape, and how to read it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which files hold which tensors: enough to write the same files again."""

    files: dict[str, dict[str, str]]  # file name -> tensor name -> type, in the file's order
    metadata: dict[str, dict]  # file name -> the header's metadata

    def to_json(self) -> dict:
        return {"files": self.files, "metadata": self.metadata}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def read_header(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, in its order, and its metadata.

    Raises InputError for a header that is truncated, too long, not JSON, of unknown types, or
    whose tensors do not cover the rest of the file exactly, without gap or overlap.
    """

    def bad(why):
        return InputError(f"{path} is not a sound safetensors file: {why}")

    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            first = f.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                raise bad("it is truncated")
            if length > MAX_HEADER:
                raise bad(f"its header is {length} bytes long")
            raw = json.loads(f.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise bad(f"its header is not JSON ({e})") from None
    if not isinstance(raw, dict):
        raise bad("its header is not an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise bad("its metadata is not an object")

    tensors, end = {}, 0
    for name, entry in sorted(raw.items(), key=lambda item: _offset(item[1])):
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
            sound = type(dtype) is str and all(
                type(n) is int and n >= 0 for n in (*shape, begin, stop))
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise bad(f"the entry of tensor {name!r} is malformed")
        if dtype not in DTYPES:
            raise bad(f"tensor {name!r} has the unknown type {dtype!r}")
        if begin != end or stop - begin != nbytes(dtype, shape):
            raise bad(f"tensor {name!r} does not lie where it should")
        tensors[name] = Tensor(dtype, shape, _reader(path, 8 + length + begin, dtype, shape))
        end = stop
    if 8 + length + end != size:
        raise bad(f"it has {size} bytes where its header describes {8 + length + end}")
    return tensors, metadata


def _no_duplicates(pairs):
    if len(keys := {k for k, _ in pairs}) != len(pairs):
        raise ValueError(f"a name appears twice among {sorted(keys)[:3]}...")
    return dict(pairs)


def _offset(entry):
    """Where an entry begins and ends, to sort by; what is malformed comes first."""
    try:
        begin, end = entry["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError):
        return -1, -1


def _reader(path, offset, dtype, shape):
    def read():
        array = np.empty(shape, DTYPES[dtype])
        with open(path, "rb") as f:
            f.seek(offset)
            if f.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:
                raise InputError(f"{path} is truncated")
        return array

    return read


def open_folder(folder: Path) -> tuple[dict[str, Tensor], Layout]:
    """All tensors of a part of a release, and their layout.

    Takes `*.safetensors` (one file, or an index and its shards; of several variants the unnamed
    one) or, where there is none, `*.bin`. Raises InputError where weights are missing or
    ambiguous, or where an index and its files disagree.
    """
    index = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    if not index and not files:
        return _open_bin(folder)
    # Beside the weights a folder may hold a variant of them, in float16 say.
    index = [f for f in index if f.name.endswith(".safetensors.index.json")] or index
    files = [f for f in files if f.name in DEFAULT_FILES] or files
    if len(index) > 1 or (not index and len(files) > 1):
        raise InputError(f"{folder} has several weights; keep the ones to use: "
                         f"{', '.join(f.name for f in index or files)}")
    if index:
        where = read_json(index[0]).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
            raise InputError(f"{index[0]} has no weight_map")
        if outside := [v for v in where.values() if Path(v).name != v]:
            raise InputError(f"{index[0]} names a file outside its folder: {outside[0]}")
        files = [folder / name for name in sorted(set(where.values()))]
    tensors, layout = {}, Layout({}, {})
    for file in files:
        found, layout.metadata[file.name] = read_header(file)
        layout.files[file.name] = {name: t.dtype for name, t in found.items()}
        for name, tensor in found.items():
            if index and where.get(name) != file.name:
                raise InputError(f"{file} holds {name!r}, which {index[0].name} puts elsewhere")
            tensors[name] = tensor
    if index and (lost := where.keys() - tensors.keys()):
        raise InputError(f"{index[0]} names {sorted(lost)[0]!r}, which no file holds")
    return tensors, layout


def _open_bin(folder: Path) -> tuple[dict[str, Tensor], Layout]:
    files = sorted(folder.glob("*.bin"))
    if not files:
        raise InputError(f"{folder} has no weights (*.safetensors)")
    try:
        import torch
    except ImportError:
        raise InputError(f"{files[0]} is an old PyTorch file: install torch to read it, or save "
                         "it as safetensors") from None
    tensors, layout = {}, Layout({}, {})
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not all(isinstance(t, torch.Tensor) for t in state.values()):
                raise ValueError("it holds more than tensors")
        except Exception as e:
            why = str(e).strip().splitlines()
            raise InputError(f"{file} does not load with weights_only, so it is refused: "
                             f"{why[0] if why else type(e).__name__}") from None
        names = {np.dtype(v).name: k for k, v in DTYPES.items()}
        out = re.sub(r"^pytorch_model", "model", file.stem) + ".safetensors"
        layout.metadata[out] = {"format": "pt"}
        layout.files[out] = {k: names[str(t.dtype).removeprefix("torch.")]
                             for k, t in state.items()}
        tensors |= {k: Tensor(layout.files[out][k], tuple(t.shape), _bin_reader(t))
                    for k, t in state.items()}
    return tensors, layout


def _bin_reader(t):
    def read():
        import torch
        if t.dtype == torch.bfloat16:  # numpy takes it by its bits only
            return t.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return t.contiguous().numpy()

    return read


def copy(array: np.ndarray, out: np.ndarray) -> None:
    """`array` into `out`, a band of the last axis at a time: where one is a transpose, its part of
    a band fits in the processor's cache, and the copy is up to three times faster."""
    for i in range(0, array.shape[-1], BAND):
        out[..., i:i + BAND] = array[..., i:i + BAND]


class Writer:
    """A safetensors file of known tensors, whose data may come in any order."""

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple]], metadata: dict):
        """`tensors`: name -> (type, shape), in the file's order."""
        header, end = ({"__metadata__": metadata} if metadata else {}), 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._start = 8 + len(raw)
        self._offsets = {n: e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}
        self._tensors, self._left = tensors, set(tensors)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._file.truncate(self._start + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """One tensor's data; its shape must be the declared one, its type is cast."""
        dtype, shape = self._tensors[name]
        if array.shape != tuple(shape):
            raise ValueError(f"{name}: {array.shape} for {shape}")
        self._left.remove(name)
        self._file.seek(self._start + self._offsets[name])
        if array.flags.c_contiguous and array.dtype == DTYPES[dtype]:
            self._file.write(array.reshape(-1).view(np.uint8).data)
            return
        rows = max(1, PIECE // max(nbytes(dtype, shape[1:]), 1))
        for i in range(0, len(array), rows):
            piece = np.empty(array[i:i + rows].shape, DTYPES[dtype])
            copy(array[i:i + rows], piece)
            self._file.write(piece.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Raises ValueError where a tensor was never written."""
        self._file.close()
        if self._left:
            raise ValueError(f"tensors never written: {sorted(self._left)[:5]}")
