"""MetaQuery's conditioning: learnable queries after a prompt gather what the frozen Qwen2.5-VL
makes of it, and the connector turns its states at them into the transformer's conditions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unipic_jax.conditioning import qwen_chat
from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.model import Part
from unipic_jax.models import connector
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language, rope, vision

PREFIX = "Generate an image: "  # of the prompts that have no picture, the empty one too


class Inputs(NamedTuple):
    """Prompts as arrays. After their padded tokens, which `mask` tells, come Q queries."""

    ids: np.ndarray  # int32 [B, S]
    mask: np.ndarray  # bool [B, S + Q]
    positions: np.ndarray  # int32 [3, B, S + Q]
    pictures: vision.Pictures | None


def check(parts: Mapping[str, Part]) -> None:
    """Raises InputError where the parts "mllm", "conditioner" and "transformer" do not fit, or
    where the language model's folder lacks its tokenizer or its template."""
    mllm, conditioner = parts["mllm"], parts["conditioner"]
    if mllm.module is not qwen:
        raise InputError(f"{mllm.folder} is not a Qwen2.5-VL")
    if conditioner.module is not connector:
        raise InputError(f"{conditioner.folder} is not a conditioner of MetaQuery")
    mine, its = conditioner.config, parts["transformer"].config
    for name, other, value in (
            ("llm_hidden_size", mllm, mllm.config.hidden_size),
            ("joint_attention_dim", parts["transformer"], its.joint_attention_dim),
            ("pooled_projection_dim", parts["transformer"], its.pooled_projection_dim)):
        if getattr(mine, name) != value:
            raise InputError(f"{conditioner.folder} does not fit {other.folder}: its {name} is "
                             f"{getattr(mine, name)} where {value} is needed")
    qwen_chat.open_chat(mllm.folder)


def conversation(text: str, picture: Image.Image | None) -> qwen_chat.Conversation:
    """What is said to Qwen for a prompt to draw from, or to edit a picture by."""
    if picture is None:
        return [{"role": "user", "content": PREFIX + text}]
    return [{"role": "user", "content": [{"type": "image", "image": picture},
                                         {"type": "text", "text": text}]}]


def prepare(
    chat: qwen_chat.Chat, cfg: qwen.Config, num_queries: int, prompts: Sequence[str],
    pictures: Sequence[Image.Image] | None = None, *, three_axis_rope: bool = False,
    newline: bool = False, length: int | None = None,
) -> Inputs:
    """Prompts to draw from or, with a picture each (all of the size the edit works at), to edit
    by. On the host.

    A picture is shown to Qwen at 28/32 of each side, so that a token stands for 32 pixels. The
    released code gives its tokens positions as if they were text, and begins the prompt right
    after it; `three_axis_rope` and `newline` do what Qwen was trained with. `length` is S, by
    default what the longest prompt needs.
    """
    shown = [None] * len(prompts) if pictures is None else pictures
    chats = [conversation("\n" * newline * bool(picture) + text, picture)
             for text, picture in zip(prompts, shown, strict=True)]
    images = None
    if pictures is not None:
        width, height = pictures[0].size
        pixels = int(height * 28 / 32 * width * 28 / 32)
        images = dataclasses.replace(chat.images, min_pixels=pixels, max_pixels=pixels)
    ids, mask, grids, packed = qwen_chat.read(chat, cfg, chats, images, length)
    mask = np.pad(mask, ((0, 0), (0, num_queries)), constant_values=True)
    if three_axis_rope:
        longer = np.pad(ids, ((0, 0), (0, num_queries)))
        positions, _ = rope.picture_positions(cfg, longer, grids, mask)
    else:
        positions = rope.text_positions(mask)
    return Inputs(ids, mask, positions, packed)


def query_states(
    cfg: qwen.Config, params: Tree, queries: jax.Array, inputs: Inputs, *, dtype=jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Qwen's normalized final states [B, Q, D] at the queries [Q, D] after each prompt.

    `remat` is what the gradient computes again of its layers (`core.remat`).
    """
    x = qwen.embed(cfg, params, inputs.ids, inputs.pictures, dtype)
    queries = meshes.replicate(queries.astype(dtype))
    queries = jnp.broadcast_to(queries, (len(x), *queries.shape), out_sharding=meshes.spec_of(x))
    x = jnp.concatenate([x, queries], 1)
    states, _ = language.apply(cfg, params, x, inputs.positions, inputs.mask, remat=remat)
    return states[:, -queries.shape[1]:]


def apply(
    qwen_cfg: qwen.Config, cfg: connector.Config, qwen_params: Tree, params: Tree, inputs: Inputs,
    *, dtype=jnp.float32, remat: str = "none",
) -> dict[str, jax.Array]:
    """`Inputs` -> {"context": [B, Q, joint_attention_dim], "pooled": [B, pooled_projection_dim]},
    by Qwen's parameters and the conditioner's, which are the queries and the connector."""
    states = query_states(qwen_cfg, qwen_params, params["queries"], inputs, dtype=dtype,
                          remat=remat)
    context, pooled = connector.apply(cfg, params, states, remat=remat)
    return {"context": context, "pooled": pooled}


_apply = jax.jit(apply, static_argnames=("qwen_cfg", "cfg", "dtype"))


def encode(
    parts, prompts: Sequence[str], pictures: Sequence[Image.Image] | None, dtype, **style: bool
) -> dict[str, jax.Array]:
    """The conditions of prompts, and of a picture each for edits, by the parts "mllm" and
    "conditioner"; `style` as in `prepare`."""
    mllm, conditioner = parts["mllm"], parts["conditioner"]
    chat = qwen_chat.open_chat(mllm.folder)
    inputs = prepare(chat, mllm.config, conditioner.config.num_queries, prompts, pictures, **style)
    return _apply(mllm.config, conditioner.config, parts.load("mllm", dtype),
                  parts.load("conditioner", dtype), inputs, dtype=dtype)
