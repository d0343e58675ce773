"""Whole folders between the released PyTorch layout and ours, bit for bit.

Ours is the same folder with each part's weight files replaced by an Orbax checkpoint (`params/`)
and by `layout.json`, which says what files they came from so that the same ones can be written.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import traverse_util
from tqdm import tqdm

from unipic_jax.convert import names, store, torch_files
from unipic_jax.convert.torch_files import DTYPES, Layout, Tensor
from unipic_jax.core import files, params
from unipic_jax.core.config import read_json
from unipic_jax.core.errors import InputError
from unipic_jax.model import Part, config_file, read_part

PARAMS, LAYOUT = "params", "layout.json"
WEIGHTS = ("*.safetensors", "*.bin")
SHARD_BYTES = {"diffusion_pytorch_model": 10e9, "model": 5e9}  # diffusers', transformers' limits
NAMED = {np.dtype(v): k for k, v in DTYPES.items()}


def is_ours(folder: Path) -> bool:
    """Whether a part's weights lie in our layout."""
    return (folder / PARAMS).is_dir()


def convert(source: Path, target: Path, progress: bool = True) -> list[Path]:
    """A release (or one part of it) at `source` into our layout at `target`; returns the parts.

    Raises InputError for whatever cannot be read or does not fit its config; then nothing is
    written.
    """
    if any(map(is_ours, _folders(source))):
        raise InputError(f"{source} is in the JAX layout already; `unipic export` turns it back")
    return _whole_folder(source, target, _convert_part, WEIGHTS, progress, "convert")


def export(source: Path, target: Path, progress: bool = True, dtype=None) -> list[Path]:
    """Our layout at `source` into the released one at `target`; returns the parts.

    Parts go to the files they came from; those that were never released, to default ones, in
    `dtype` or as they are stored. Parts that are in the released layout already are copied.
    Raises InputError for whatever cannot be read or does not fit its config.
    """
    if not any(map(is_ours, _folders(source))):
        raise InputError(f"{source} holds no part in the JAX layout (no {PARAMS} folder)")
    one = functools.partial(_export_part, dtype=dtype)
    return _whole_folder(source, target, one, (PARAMS, LAYOUT), progress, "export")


def _folders(source: Path) -> list[Path]:
    """The folder itself where it is a part, else the folders in it."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder")
    if config_file(source):
        return [source]
    return sorted(f for f in source.iterdir() if f.is_dir() and not f.name.startswith("."))


def _whole_folder(source, target, one: Callable, left_out: tuple, progress: bool,
                  what: str) -> list[Path]:
    """Parts through `one`, everything else but `left_out` copied as it is."""
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} lies inside {source}; choose another folder")
    folders = _folders(source)
    parts = [p for p in (read_part(f) for f in folders if config_file(f)) if p.has_weights]
    if not parts:
        raise InputError(f"{source} holds no part of a model (no folder with a config.json)")
    jobs = [one(p) for p in parts]  # everything is checked before anything is written
    with (files.new_folder(target) as partial,
          tqdm(total=sum(size for size, _ in jobs), unit="B", unit_scale=True,
               desc=f"{what} {target.name}",
               disable=not progress) as bar):
        ignore = shutil.ignore_patterns(*left_out, ".*")
        shutil.copytree(source, partial, ignore=ignore, dirs_exist_ok=True)
        for part, (_, write) in zip(parts, jobs):
            write(partial / part.folder.relative_to(source), bar.update)
    return [target / p.folder.relative_to(source) for p in parts]


def _convert_part(part: Part):
    tensors, layout = torch_files.open_folder(part.folder)
    plan = match(part, tensors)

    def write(folder: Path, done: Callable):
        def pieces():
            for rule, found in plan:
                size = max(torch_files.nbytes(t.dtype, t.shape) for t in found)
                step = store.layers_apiece(size, len(found))
                kind = leaf_type(found)
                for first in range(0, len(found), step):
                    array = stacked(rule, found[first:first + step], kind)
                    yield store.Piece(rule.path, array, first if step < len(found) else None)
                    done(array.nbytes)
                    del array

        store.save(folder / PARAMS, pieces())
        (folder / LAYOUT).write_text(json.dumps(layout.to_json(), indent=1), encoding="utf-8")

    return sum(torch_files.nbytes(t.dtype, t.shape) for t in tensors.values()), write


Plan = list[tuple[names.Rule, list[Tensor]]]


def match(part: Part, tensors: dict[str, Tensor]) -> Plan:
    """Each leaf of the part with the tensors that make it.

    Raises InputError that lists the tensors that are missing, not known, or of another shape
    than the config says; and where two copies of a tied tensor differ.
    """
    known: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tied = known.setdefault(names.canonical(part.module, name), tensor)
        if tied is not tensor and (tied.shape != tensor.shape or
                                   tied.read().tobytes() != tensor.read().tobytes()):
            raise InputError(f"{part.folder}: {name} differs from the tensor it is tied to")
    rules = names.rules(part.module, part.config)
    shapes = torch_shapes(part, rules)
    wrong = [f"missing: {n}" for n in shapes if n not in known]
    wrong += [f"not known: {n}" for n in tensors if names.canonical(part.module, n) not in shapes]
    wrong += [f"{n} is {list(known[n].shape)}, the config says {list(shape)}"
              for n, shape in shapes.items() if n in known and known[n].shape != shape]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{part.folder} does not fit its config: {'; '.join(wrong[:8])}{more}")
    return [(rule, [known[n] for n in rule.names]) for rule in rules]


def torch_shapes(part: Part, rules: list[names.Rule]) -> dict[str, tuple[int, ...]]:
    """The shape of every released tensor, from our declaration of the weights."""
    specs = traverse_util.flatten_dict(part.specs, is_leaf=lambda _, s: params.is_spec(s))
    if specs.keys() != {r.path for r in rules}:
        raise AssertionError(f"the table and the specs of {part.module.__name__} differ: "
                             f"{specs.keys() ^ {r.path for r in rules}}")
    shapes = {}
    for rule in rules:
        shape = specs[rule.path].shape[1:] if rule.stacked else specs[rule.path].shape
        back = names.FORMS[rule.form][1](np.broadcast_to(np.uint8(0), shape)).shape
        shapes |= {name: back for name in rule.names}
    return shapes


def leaf_type(tensors: list[Tensor]) -> np.dtype:
    """The type of a leaf: its tensors', or float32 where they differ, which holds them all."""
    kinds = {np.dtype(DTYPES[t.dtype]) for t in tensors}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def stacked(rule: names.Rule, tensors: list[Tensor], dtype: np.dtype) -> np.ndarray:
    """A leaf, or some layers of a stack, in memory, read tensor by tensor."""
    forward = names.FORMS[rule.form][0]
    shape = forward(np.broadcast_to(np.uint8(0), tensors[0].shape)).shape
    out = np.empty((len(tensors), *shape), dtype)
    for layer, tensor in zip(out, tensors):
        torch_files.copy(forward(tensor.read()), layer)
    return out if rule.stacked else out[0]


def _export_part(part: Part, dtype=None):
    if not is_ours(part.folder):  # a frozen part of a trained model: it is copied with the rest
        match(part, torch_files.open_folder(part.folder)[0])
        return 0, lambda folder, done: None
    rules = names.rules(part.module, part.config)
    shapes = torch_shapes(part, rules)
    stored = store.described(part.folder / PARAMS)
    off = stored.keys() ^ {r.path for r in rules}
    if off:
        raise InputError(f"{part.folder} does not fit its config: leaf {'/'.join(sorted(off)[0])} "
                         "is missing or not known")
    places = {n: (r.path, i if r.stacked else None, r) for r in rules
              for i, n in enumerate(r.names)}
    layout = _layout(part, {n: (NAMED[stored[p][1]], shapes[n])
                            for n, (p, _, _) in sorted(places.items())})
    if dtype is not None:
        layout = Layout({f: dict.fromkeys(held, NAMED[np.dtype(dtype)])
                         for f, held in layout.files.items()}, layout.metadata)

    def write(folder: Path, done: Callable):
        writers, targets = {}, {}
        for file, held in layout.files.items():
            known = {n: names.canonical(part.module, n) for n in held}
            writers[file] = torch_files.Writer(
                folder / file, {n: (held[n], shapes[c]) for n, c in known.items()},
                layout.metadata[file])
            for name, c in known.items():
                targets.setdefault(c, []).append((writers[file], name))
        by_path = {}
        for name, (path, i, rule) in places.items():
            by_path.setdefault(path, []).append((name, i, rule))
        for path, leaf, first in store.pieces(part.folder / PARAMS):
            first = first or 0
            for name, i, rule in by_path[path]:
                if i is not None and not first <= i < first + len(leaf):
                    continue
                back = names.FORMS[rule.form][1](leaf if i is None else leaf[i - first])
                for writer, stored_name in targets[name]:
                    writer.write(stored_name, back)
            done(leaf.nbytes)
            del leaf, back  # not held while the next one is read
        for writer in writers.values():
            writer.close()
        if dtype is not None:  # the release's own index tells other sizes
            for index in folder.glob("*.safetensors.index*.json"):
                index.unlink()
        write_index(folder, layout, shapes, part)

    return sum(int(np.prod(s)) * d.itemsize for s, d in stored.values()), write


def _layout(part: Part, tensors: dict[str, tuple[str, tuple]]) -> Layout:
    """The layout that the part came from, or the default one."""
    if (file := part.folder / LAYOUT).is_file():
        raw = read_json(file)
        layout = Layout(raw["files"], raw["metadata"])
        held = {names.canonical(part.module, n) for f in layout.files.values() for n in f}
        if held != tensors.keys():
            raise InputError(f"{file} does not name the tensors of the config; remove it to "
                             "export to default files")
        return layout
    return default_layout(part, tensors)


def default_layout(
    part: Part, tensors: dict[str, tuple[str, tuple]], shard_bytes: float | None = None
) -> Layout:
    """One file, or shards in this order: by default where the library that reads it would."""
    diffusers = "_class_name" in read_json(config_file(part.folder))
    stem = "diffusion_pytorch_model" if diffusers else "model"
    limit, shards, size = shard_bytes or SHARD_BYTES[stem], [{}], 0
    for name, (dtype, shape) in tensors.items():
        n = torch_files.nbytes(dtype, shape)
        if shards[-1] and size + n > limit:
            shards.append({})
            size = 0
        shards[-1][name], size = dtype, size + n
    files_ = {f"{stem}.safetensors": shards[0]} if len(shards) == 1 else {
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards, 1)}
    return Layout(files_, {f: {"format": "pt"} for f in files_})


def write_index(folder: Path, layout: Layout, shapes: dict, part: Part) -> None:
    """The index of shards, unless the release's own was carried along."""
    if len(layout.files) == 1 or any(folder.glob("*.safetensors.index*.json")):
        return
    stem = next(iter(layout.files)).split("-0")[0]
    total = sum(torch_files.nbytes(d, shapes[names.canonical(part.module, n)])
                for held in layout.files.values() for n, d in held.items())
    index = {"metadata": {"total_size": total},
             "weight_map": {n: f for f, held in layout.files.items() for n in sorted(held)}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n",
                                                           encoding="utf-8")
