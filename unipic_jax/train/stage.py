"""A stage of training from its config: the parts, what of them trains, and how a loss is had.

The config is an `ml_collections.ConfigDict`; `configs/` has one file a stage, and `train.config`
says what each field means.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from unipic_jax.conditioning import kontext, qwen_chat
from unipic_jax.convert import load
from unipic_jax.core import lora, params, quantize
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.model import Part, read_part
from unipic_jax.models import edit_judge, mmdit
from unipic_jax.pipelines import describe, generate
from unipic_jax.train import collate, objectives
from unipic_jax.train.step import Loss


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a config comes to."""

    parts: Mapping[str, Part]
    trained: tuple[str, ...]  # the parts that train
    combine: Callable[[Tree, Tree], Tree]  # (what trains, what is frozen) -> parameters by part
    loss: Loss
    collate: Mapping[str, collate.Collate]  # by task


def open_stage(config) -> Stage:
    """The stage that `config` describes; InputError where its parts do not fit together or a
    field has a value that is not known."""
    if config.objective not in objectives.OBJECTIVES:
        raise InputError(f"objective {config.objective!r}: choose from "
                         f"{', '.join(objectives.OBJECTIVES)}")
    parts = _open_parts(config)
    for name in (*config.trained, *config.fresh):
        if name not in parts:
            raise InputError(f"{name!r} is not a part of this stage; its parts are "
                             f"{', '.join(parts)}")
    if odd := set(config.fresh) - set(config.trained):
        raise InputError(f"{sorted(odd)[0]!r} is to be initialized anew but does not train")
    if odd := [n for n in config.int8 if n not in parts or n in config.trained]:
        raise InputError(f"{odd[0]!r} is to be kept as integers and is not a frozen part; frozen "
                         f"are {', '.join(n for n in parts if n not in config.trained)}")
    frozen = [n for n in parts if n not in config.trained or config.lora.rank]
    if odd := [n for n in config.whole if n not in frozen]:
        raise InputError(f"{odd[0]!r} is to be held whole and is not a frozen part; frozen are "
                         f"{', '.join(frozen)}")
    parts = {n: dataclasses.replace(p, whole=n in config.whole) for n, p in parts.items()}
    if config.lora.rank:
        combine = functools.partial(_with_adapters, scale=config.lora.alpha / config.lora.rank)
    else:
        combine = _joined
    objective = functools.partial(objectives.OBJECTIVES[config.objective], parts,
                                  dtype=jnp.dtype(config.dtype), remat=config.remat)
    if config.objective == "answer":
        objective = functools.partial(objective, blank=config.blank_answers)

    def loss(trained, frozen, batch, keys):
        return objective(combine(trained, frozen), batch, keys)

    return Stage(parts, tuple(config.trained), combine, loss, _collate(config, parts))


def _open_parts(config) -> Mapping[str, Part]:
    if config.objective == "answer":
        return {"mllm": describe.open_model(_folder(config, "mllm"))}
    if config.objective == "judgement":
        mllm = _folder(config, "mllm")
        return open_judge(mllm, load.find(config.judge) if config.judge else mllm)
    if config.objective == "reconstruction":
        return {"vae": read_part(_folder(config, "model") / "vae")}
    return generate.open_model(_folder(config, "model"), *(
        load.find(config[name]) if config[name] else None for name in ("mllm", "conditioner")))


def _folder(config, field: str) -> Path:
    if not config[field]:
        raise InputError(f"this stage begins with a model; give --config.{field}=DIR")
    return load.find(config[field])


def open_judge(mllm: Path, folder: Path) -> Mapping[str, Part]:
    """The language model of an edit judge, and its head, which lies in `folder`/judge."""
    parts = {"mllm": describe.open_model(mllm), "judge": read_part(folder / "judge")}
    if parts["judge"].module is not edit_judge:
        raise InputError(f"{parts['judge'].folder} is not the head of an edit judge")
    if parts["judge"].config.hidden_size != parts["mllm"].config.hidden_size:
        raise InputError(f"{parts['judge'].folder} does not fit {mllm}: its hidden_size is "
                         f"{parts['judge'].config.hidden_size} where "
                         f"{parts['mllm'].config.hidden_size} is needed")
    return parts


def _collate(config, parts):
    """Tokenizers are opened here, so that what is wrong with them is said before training."""
    if config.objective == "reconstruction":
        return {"generate": collate.pictures}
    tokens = config.data.text_tokens
    if "mllm" in parts:
        qwen_chat.open_chat(parts["mllm"].folder)
    if config.objective == "answer":
        return {"describe": collate.Answers(parts["mllm"].folder, parts["mllm"].config, tokens)}
    if config.objective == "judgement":
        return {"describe": collate.Judged(parts["mllm"].folder, parts["mllm"].config, tokens)}
    if "conditioner" in parts:
        prompts = collate.MetaQuery(
            parts["mllm"].folder, parts["mllm"].config, parts["conditioner"].config.num_queries,
            tokens, tuple(config.source_to), config.three_axis_rope, config.newline_after_picture)
    else:
        folder = load.find(config.model)
        prompts = collate.Kontext(folder, tuple(n for n in kontext.LENGTHS if n in parts))
        for name in prompts.encoders:
            kontext.tokenize(folder, name, [""])
    return dict.fromkeys(("generate", "edit"), prompts)


def _joined(trained, frozen):
    return params.union(trained, frozen)


def _with_adapters(trained, frozen, scale):
    return {name: lora.join(tree, trained[name], scale) if name in trained else tree
            for name, tree in frozen.items()}


def parameters(config, stage: Stage, mesh: jax.sharding.Mesh) -> tuple[Tree, Tree]:
    """What trains, in float32, and what is frozen, in the config's type, on the mesh.

    Parts in `fresh` are initialized from the seed; the others are read. Raises InputError where
    their weights are missing or do not fit.
    """
    trained, frozen = {}, {}
    dtype, key = jnp.dtype(config.dtype), jax.random.key(config.seed)
    for name, part in stage.parts.items():
        if not part.has_weights:
            continue
        if name not in stage.trained or config.lora.rank:
            frozen[name] = load.read(part, dtype, mesh)
        if name in config.int8:
            frozen[name] = jax.jit(quantize.quantize, donate_argnums=0)(frozen[name])
        if name not in stage.trained:
            continue
        if config.lora.rank:
            trained[name] = _init(adapter_specs(config, part), _named(key, name), mesh)
            continue
        whole = (_init(part.specs, _named(key, name), mesh) if name in config.fresh
                 else load.read(part, jnp.float32, mesh))
        trained[name], buffers = params.split_buffers(part.specs, whole)
        if buffers:
            frozen[name] = jax.tree.map(lambda a: a.astype(dtype), buffers)
    return trained, frozen


def abstract(config, stage: Stage, mesh) -> tuple[Tree, Tree]:
    """`parameters` as shapes and shardings, without memory."""
    trained, frozen = {}, {}
    dtype = jnp.dtype(config.dtype)
    for name, part in stage.parts.items():
        if not part.has_weights:
            continue
        if name not in stage.trained or config.lora.rank:
            as_kept = quantize if name in config.int8 else params
            frozen[name] = as_kept.abstract(part.specs, dtype, mesh)
        if name in stage.trained and config.lora.rank:
            trained[name] = params.abstract(adapter_specs(config, part), jnp.float32, mesh)
        elif name in stage.trained:
            own, buffers = params.split_buffers(part.specs, part.specs)
            trained[name] = params.abstract(own, jnp.float32, mesh)
            if buffers:
                frozen[name] = params.abstract(buffers, dtype, mesh)
    return trained, frozen


def adapter_specs(config, part: Part) -> Tree:
    """The low-rank adapters of a part, at the transformer's usual places unless the config names
    others."""
    return lora.specs(part.specs, tuple(config.lora.targets) or mmdit.LORA_TARGETS,
                      config.lora.rank)


def _named(key, name):
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _init(specs, key, mesh):
    return jax.jit(lambda key: params.init(specs, key),
                   out_shardings=params.shardings(specs, mesh))(key)
