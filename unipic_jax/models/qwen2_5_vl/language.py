"""Qwen2.5-VL's language model: the states of whole prompts, or token by token with a cache.

Reference: `Qwen2_5_VLTextModel` of transformers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core import ops
from unipic_jax.core import remat as remats
from unipic_jax.core.attention import attention
from unipic_jax.core.params import Tree
from unipic_jax.models.qwen2_5_vl import rope
from unipic_jax.models.qwen2_5_vl.config import Config


def new_cache(cfg: Config, x: jax.Array, length: int) -> Tree:
    """An empty cache for `length` tokens of the prompts whose embeddings are x [B, S, D]: keys and
    values [L, B, length, G, K], in the type of x, and the index that is written next."""
    G = cfg.num_key_value_heads
    shape = (cfg.num_hidden_layers, x.shape[0], length, G, cfg.head_size)
    spec = meshes.spec_of(x)
    if spec is not None:
        mesh = jax.sharding.get_abstract_mesh()
        heads = meshes.sharding(mesh, (G * cfg.head_size,), ("heads",)).spec[0]
        spec = P(None, spec[0], None, heads, None)
    return {"k": jnp.zeros(shape, x.dtype, out_sharding=spec),
            "v": jnp.zeros(shape, x.dtype, out_sharding=spec), "index": jnp.int32(0)}


def apply(
    cfg: Config, params: Tree, x: jax.Array, positions: jax.Array, mask: jax.Array,
    cache: Tree | None = None, *, remat: str = "none",
) -> tuple[jax.Array, Tree | None]:
    """Embeddings x [B, S, D] at positions [3, B, S] -> (normalized final states [B, S, D], cache).

    A token attends to those up to itself that `mask` [B, S] holds real. With a cache the S tokens
    are those from its index on, and `mask` [B, length] is of all its places; the cache that comes
    back has them, and the caller sees that they fit. `remat` is what the gradient computes again
    of each layer (`core.remat`). Raises ValueError where the mask has another length.
    """
    B, S, _ = x.shape
    length = S if cache is None else cache["k"].shape[2]
    if mask.shape != (B, length):
        raise ValueError(f"mask {mask.shape} must be {(B, length)}")
    index, kv = (0, None) if cache is None else (cache["index"], (cache["k"], cache["v"]))
    angle = rope.angles(cfg, positions)
    if cache is None:
        allowed = {"causal": True, "segments": (jnp.ones_like(mask, jnp.int32), mask)}
    else:
        past = jnp.arange(length) <= index + jnp.arange(S)[:, None]
        allowed = {"mask": mask.astype(bool)[:, None, None] & past}  # [B, 1, S, length]

    def layer(carry, numbered):
        x, kv = carry
        p, number = numbered
        y = ops.rms_norm(x, p["norm1"], eps=cfg.rms_norm_eps)
        q, k, v = (ops.linear(p[n], y).reshape(B, S, -1, cfg.head_size) for n in "qkv")
        q, k = rope.rotate(q, angle), rope.rotate(k, angle)
        if kv is not None:
            kv = tuple(lax.dynamic_update_slice(old, new[None], (number, 0, index, 0, 0))
                       for old, new in zip(kv, (k, v)))
            k, v = (lax.dynamic_index_in_dim(a, number, keepdims=False) for a in kv)
        x = x + ops.linear(p["out"], attention(q, k, v, **allowed).reshape(B, S, -1))
        y = ops.rms_norm(x, p["norm2"], eps=cfg.rms_norm_eps)
        return (x + ops.feed_forward(p, y, jax.nn.silu), kv), None

    layer = remats.remat(layer, remat)
    numbered = params["layers"], jnp.arange(cfg.num_hidden_layers)
    (x, kv), _ = ops.scan_layers(layer, (x, kv), numbered)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    return x, None if kv is None else {"k": kv[0], "v": kv[1], "index": index + S}


def logits(cfg: Config, params: Tree, states: jax.Array) -> jax.Array:
    """States [..., D] of `apply` -> logits [..., V], in their type."""
    head = {"kernel": params["token"].T} if cfg.tie_word_embeddings else params["head"]
    return ops.linear(head, states)
