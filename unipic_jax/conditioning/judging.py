"""Edits as their judge sees them: a picture, what was made of it, and the instruction.

Both pictures are prepared inside the program, so that what a policy has just drawn can be judged
in the same step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from PIL import Image

from unipic_jax.conditioning import qwen_chat, qwen_images
from unipic_jax.core import mesh as meshes
from unipic_jax.core.params import Tree
from unipic_jax.models import edit_judge
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language, rope, vision


class Inputs(NamedTuple):
    """The chats about B edits as arrays, without their pictures."""

    ids: np.ndarray  # int32 [B, S]
    mask: np.ndarray  # bool [B, S]
    positions: np.ndarray  # int32 [B, 3, S]


def prepare(
    chat: qwen_chat.Chat, cfg: qwen.Config, instructions: Sequence[str], size: tuple[int, int],
    text_tokens: int,
) -> Inputs:
    """Chats about edits of pictures of a size (width, height), on the host. Instructions are cut to
    `text_tokens`, so that all have one shape."""
    picture = Image.new("RGB", size)

    def conversation(text):
        shown = {"type": "image", "image": picture}
        return [{"role": "user", "content": [shown, shown, {"type": "text", "text": text}]}]

    cut = [chat.tokenizer.decode(ids[:text_tokens]) if len(ids) > text_tokens else text
           for text in instructions for ids in [chat.tokenizer(text).input_ids]]
    bare = qwen_chat.read(chat, cfg, [conversation("")])
    read = qwen_chat.read(chat, cfg, [conversation(text) for text in cut],
                          length=int(bare.mask.sum()) + text_tokens)
    positions, _ = rope.picture_positions(cfg, read.ids, read.grids, read.mask)
    return Inputs(read.ids, read.mask, positions.swapaxes(0, 1))


def apply(
    images: qwen_images.Config, qwen_cfg: qwen.Config, cfg: edit_judge.Config, qwen_params: Tree,
    params: Tree, inputs: Inputs, before: jax.Array, after: jax.Array, *, dtype=jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """The scores float32 [B] of edits: pictures [B, H, W, 3] in [0, 1] before and after."""
    shown = _pictures(images, qwen_cfg, before, after)
    x = qwen.embed(qwen_cfg, qwen_params, inputs.ids, shown, dtype)
    states, _ = language.apply(qwen_cfg, qwen_params, x, jnp.swapaxes(inputs.positions, 0, 1),
                               inputs.mask, remat=remat)
    return edit_judge.apply(cfg, params, states, inputs.mask)


def _pictures(images, cfg, before, after) -> vision.Pictures:
    B, height, width, _ = before.shape
    h, w = qwen_images.smart_resize(images, height, width)
    grid = np.array([(1, h // images.patch_size, w // images.patch_size)] * 2)
    patches = jnp.concatenate([qwen_images.patches(images, p, (h, w)) for p in (before, after)], 1)
    # Where each patch lies is the same in all rows: packed in their place, their numbers tell.
    numbers = np.arange(grid.prod(1).sum(), dtype=np.float32)[:, None]
    row = vision.pack(cfg.vision, [(numbers, grid)])
    spec = meshes.spec_of(before)

    def whole(a):
        out = None if spec is None else P(spec[0], *[None] * (a.ndim - 1))
        return jnp.broadcast_to(a, (B, *a.shape[1:]), out_sharding=out)

    laid = jnp.take(patches, row.patches[0, ..., 0].astype(np.int32), axis=1)
    return vision.Pictures(laid, whole(row.places), whole(row.segments), whole(row.order))
