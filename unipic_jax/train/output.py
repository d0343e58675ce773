"""A trained model as a folder that `generate`, `edit`, `describe` and the next stage open."""

import contextlib
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
from unipic_jax.model import config_file
from unipic_jax.train.stage import Stage


def write(config, stage: Stage, trained: Tree, frozen: Tree, target: Path,
          changes: Mapping[str, dict] = {}) -> None:
    """The model of a stage, trained parts in the JAX layout, the others as they were.

    With adapters the parts hold them merged, and `lora/` the adapters by themselves in the layout
    of PEFT. `changes` are keys of a part's config.json that training has found. All processes call
    it. Raises InputError where the folder cannot be written.
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
    first = jax.process_index() == 0
    with _new_folder(target) as partial:
        folders = {n: partial if n == "mllm" else partial / n for n in stage.trained}
        if first:
            _copy(stage, partial)
        _wait()
        for name, folder in folders.items():
            leaves = traverse_util.flatten_dict(whole[name]).items()
            store.save(folder / convert.PARAMS, (store.Piece(p, a) for p, a in leaves))
            if first and name in changes:
                _change(config_file(folder), changes[name])
            if first and adapters:
                (partial / "lora" / name).mkdir(parents=True)
                peft.export_lora(stage.parts[name], adapters[name], config.lora.alpha,
                                 partial / "lora" / name / peft.FILE)
    _wait()


@contextlib.contextmanager
def _new_folder(target: Path):
    """`files.new_folder` of the first process, for all: Orbax saves with all of them or none."""
    if jax.process_count() == 1:
        with files.new_folder(target) as partial:
            yield partial
        return
    target = target.absolute()
    number = int(multihost_utils.broadcast_one_to_all(np.int32(os.getpid())))
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            yield stack.enter_context(files.new_folder(target))
        else:
            yield files.partial_name(target, number)
        _wait()


def _wait():
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the model is written")


def _copy(stage: Stage, target: Path) -> None:
    """Everything that does not train, and of the parts that do all but their weights."""
    if "mllm" in stage.trained:  # a folder of its own, like that of its release
        _copy_part(stage.parts["mllm"].folder, target, weights=False)
        if "judge" in stage.parts:
            _copy_part(stage.parts["judge"].folder, target / "judge",
                       weights="judge" not in stage.trained)
        return
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


def _change(file: Path, changes: dict) -> None:
    raw = read_json(file) | changes
    file.unlink()  # it may be linked to another model's
    file.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
