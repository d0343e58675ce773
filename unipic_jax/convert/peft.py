"""Adapters to and from the file that diffusers and PEFT use, bit for bit.

The file is `SD3LoraLoaderMixin.save_lora_weights`'s: a tensor a layer, the PEFT config in the
header's metadata. Without one, alpha is the rank, as diffusers takes it.
"""

import json
from pathlib import Path

import numpy as np
from flax import traverse_util

from unipic_jax.convert import convert, names, torch_files
from unipic_jax.core import files, lora, params
from unipic_jax.core.errors import InputError
from unipic_jax.model import Part
from unipic_jax.models import mmdit

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
METADATA = "lora_adapter_metadata"
# What PEFT may add to an adapter that is not lora_A, lora_B and one alpha, and its value without.
PLAIN = {"use_dora": False, "use_rslora": False, "lora_bias": False, "bias": "none",
         "rank_pattern": {}, "alpha_pattern": {}}


def export_lora(part: Part, adapters: params.Tree, alpha: float, file: Path) -> None:
    """The adapters of a part, as `core.lora.specs` lays them out, into `file`, in their own types.

    Raises ValueError for adapters of another model, InputError where the file cannot be written.
    """
    leaves = {p: np.asarray(a) for p, a in traverse_util.flatten_dict(adapters).items()}
    places = {n: place for n, place in sorted(_places(part).items()) if place[0] in leaves}
    if unknown := leaves.keys() - {path for path, _ in places.values()}:
        raise ValueError(f"{part.folder} has no layer for {'/'.join(sorted(unknown)[0])}")
    tensors = {n: (leaves[path] if i is None else leaves[path][i]).T
               for n, (path, i) in places.items()}
    prefix, rank = _prefix(part), next(
        a.shape[-1] for path, a in leaves.items() if path[-1] == "lora_a")
    config = {"r": rank, "lora_alpha": alpha,
              "target_modules": sorted({n.split(".lora_")[0] for n in tensors})}
    metadata = json.dumps({f"{prefix}.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)
    with files.new_file(file) as partial:
        writer = torch_files.Writer(
            partial, {f"{prefix}.{n}": (convert.NAMED[t.dtype], t.shape)
                      for n, t in tensors.items()}, {"format": "pt", METADATA: metadata})
        for n, tensor in tensors.items():
            writer.write(f"{prefix}.{n}", tensor)
        writer.close()


def read_lora(part: Part, file: Path) -> tuple[params.Tree, int, float]:
    """The adapters of a part in `file`, on the host, their rank and alpha.

    Other parts' are passed over; layers of a stack that the file leaves out are zeros. Raises
    InputError where there is none for the part, where a tensor is unknown, missing or does not
    fit, or where the layers differ in rank or alpha.
    """
    prefix = _prefix(part) + "."
    tensors, metadata = torch_files.read_header(file)
    tensors = {names.canonical(part.module, n.removeprefix(prefix)): t
               for n, t in tensors.items() if n.startswith(prefix)}
    if not tensors:
        raise InputError(f"{file} holds no adapter of the {prefix[:-1]}")
    places = _places(part)
    if unknown := tensors.keys() - places.keys():
        raise InputError(f"{file}: tensor {prefix}{sorted(unknown)[0]} is not known")
    config = _config(file, metadata, prefix)
    ranks = {t.shape[0 if ".lora_A." in n else -1] for n, t in tensors.items() if t.shape}
    rank = config.get("r", min(ranks, default=0))
    layers = {"/".join(places[n][0][:-1]) for n in tensors}
    specs = traverse_util.flatten_dict(lora.specs(part.specs, layers, rank),
                                       is_leaf=lambda _, s: params.is_spec(s))
    found = {path: {} for path in specs}
    for name, tensor in tensors.items():
        path, i = places[name]
        shape = specs[path].shape[::-1] if i is None else specs[path].shape[:0:-1]
        if tensor.shape != shape:
            raise InputError(f"{file}: tensor {prefix}{name} is {list(tensor.shape)}, the config "
                             f"and rank {rank} say {list(shape)}")
        found[path][i] = tensor
    tree = {}
    for path, at in found.items():
        if at.keys() != found[*path[:-1], "lora_b"].keys():
            raise InputError(f"{file}: {'/'.join(path[:-1])} has lora_A and lora_B not of the same "
                             "layers")
        tree[path] = np.zeros(specs[path].shape, convert.leaf_type([*at.values()]))
        for i, tensor in at.items():
            tree[path][... if i is None else i] = tensor.read().T
    return traverse_util.unflatten_dict(tree), rank, config.get("lora_alpha", rank)


def _prefix(part: Part) -> str:
    """What a part is called in the file; diffusers knows the transformer by this name only."""
    return "transformer" if part.module is mmdit else part.folder.name


def _places(part: Part) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Every tensor that adapters can have: its leaf and, in a stack, its layer."""
    return {f"{name.removesuffix('.weight')}.{theirs}.weight":
            ((*rule.path[:-1], ours), i if rule.stacked else None)
            for rule in names.rules(part.module, part.config) if rule.form == "dense"
            for i, name in enumerate(rule.names)
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B"))}


def _config(file: Path, metadata: dict, prefix: str) -> dict:
    """The PEFT config of a part, or {} where the file has none."""
    try:
        raw = json.loads(metadata.get(METADATA, "{}"))
        config = {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}
        sound = (type(config.get("r", 1)) is int
                 and type(config.get("lora_alpha", 1)) in (int, float))
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{file}: its {METADATA} is not a PEFT config")
    if odd := [k for k, plain in PLAIN.items() if config.get(k, plain) not in (plain, None)]:
        raise InputError(f"{file}: {odd[0]} = {json.dumps(config[odd[0]])} is not supported")
    return config
