"""A trained model as a folder that `generate`, `edit`, `describe` and the next stage open."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from unipic_jax.conditioning import kontext
from unipic_jax.convert import convert, peft, store
from unipic_jax.core import files, lora
from unipic_jax.core import mesh as meshes
from unipic_jax.core.config import read_json
from unipic_jax.core.params import Tree
from unipic_jax.model import Part, config_file
from unipic_jax.train.stage import Stage


def write(config, stage: Stage, trained: Tree, frozen: Tree, target: Path,
          changes: Mapping[str, dict] = {}) -> None:
    """The model of a stage, trained parts in the JAX layout, the others as they were.

    With adapters the parts hold them merged, and `lora/` the adapters by themselves in the layout
    of PEFT. `changes` are keys of a part's config.json that training has found. All processes call
    it; the first one writes. Raises InputError where the folder cannot be written.
    """
    dtype, whole = np.dtype(config.save_dtype), {}
    for name in stage.trained:
        if config.lora.rank:
            scale = config.lora.alpha / config.lora.rank
            whole[name] = jax.jit(lora.merge, static_argnums=2)(frozen[name], trained[name], scale)
        else:
            whole[name] = stage.combine(trained, frozen)[name]
        whole[name] = jax.tree.map(lambda a: meshes.on_host(a).astype(dtype), whole[name])
    adapters = jax.tree.map(meshes.on_host, trained) if config.lora.rank else None
    if jax.process_index() == 0:
        with files.new_folder(target) as partial:
            folders = _copy(stage, partial)
            for name in stage.trained:
                _write_part(stage.parts[name], whole[name], folders[name], changes.get(name, {}))
                if adapters:
                    (partial / "lora" / name).mkdir(parents=True)
                    peft.export_lora(stage.parts[name], adapters[name], config.lora.alpha,
                                     partial / "lora" / name / peft.FILE)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the model is written")


def _copy(stage: Stage, target: Path) -> dict[str, Path]:
    """Everything that does not train, and the folders of the parts that do, without weights."""
    if "mllm" in stage.trained:  # a folder of its own, like that of its release
        _copy_part(stage.parts["mllm"].folder, target, weights=False)
        return {"mllm": target}
    base = next(p.folder.parent for n, p in stage.parts.items()
                if n not in ("mllm", "conditioner"))
    unused = {"mllm"}
    if "conditioner" in stage.parts:  # which stands in for these
        unused |= {*kontext.LENGTHS, *(n.replace("text_encoder", "tokenizer")
                                       for n in kontext.LENGTHS), "conditioner"}
        _copy_part(stage.parts["conditioner"].folder, target / "conditioner",
                   weights="conditioner" not in stage.trained)
    for item in sorted(base.iterdir()):
        if item.is_dir() and item.name not in unused and not item.name.startswith("."):
            _copy_part(item, target / item.name, weights=item.name not in stage.trained)
        elif item.is_file():
            _link(item, target / item.name)
    return {name: target / name for name in stage.trained}


def _copy_part(source: Path, target: Path, *, weights: bool) -> None:
    left_out = () if weights else (*convert.WEIGHTS, "*.index.json", convert.PARAMS,
                                   convert.LAYOUT)
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=_link,
                    ignore=shutil.ignore_patterns(*left_out, ".*"))


def _link(source, target):
    """A second name for a file, which nothing changes in place; a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_part(part: Part, tree: Tree, folder: Path, changes: dict) -> None:
    leaves = traverse_util.flatten_dict(tree).items()
    store.save(folder / convert.PARAMS, (store.Piece(p, a) for p, a in leaves))
    if changes:
        file = config_file(folder)
        raw = read_json(file) | changes
        file.unlink()  # it may be linked to another model's
        file.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
