"""Attention behind one function: plain XLA, blockwise, or cuDNN's fused kernel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes

BLOCK = 256  # queries a block: a head's scores for them stay in a core's cache
IMPLEMENTATIONS = ("xla", "blockwise", "cudnn")


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    causal: bool = False, bias: jax.Array | None = None, mask: jax.Array | None = None,
    scale: float | None = None, implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v, with the softmax in float32.

    q [B, T, H, K]; k, v [B, S, G, K], where G divides H (grouped queries); bias and mask (bool,
    True where a query may attend) broadcast to [B, H, T, S]; a query that may attend nowhere gets
    the mean of v; scale is 1/sqrt(K) unless given. Returns [B, T, H, K] in the type of q.
    `implementation`: "xla" holds all scores; "blockwise" never holds more than those of `BLOCK`
    queries of a head, in the gradient neither; "cudnn" is NVIDIA's kernel, in half precision.
    By default the best of them for the platform, the type and the length.
    Raises ValueError for an unknown implementation or one that cannot do what is asked.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = bias is None and mask is None and not causal
    implementation = implementation or _choose(q, k, plain)
    if implementation == "xla":
        f = functools.partial(_xla, causal=causal, scale=scale)
        return f(q, k, v, bias, mask)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: choose from "
                         f"{', '.join(IMPLEMENTATIONS)}")
    if not plain:
        raise ValueError(f"{implementation} attention takes no bias, mask or causal; use xla")
    local = functools.partial(_blockwise if implementation == "blockwise" else _cudnn, scale=scale)
    spec = meshes.spec_of(q)
    if spec is None:
        return local(q, k, v)
    spec = P(spec[0], None, spec[2], None)  # whole sequences and heads on each device
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec)(
        *(jax.reshard(a, spec) for a in (q, k, v)))


def _choose(q, k, plain: bool) -> str:
    platform = jax.default_backend()
    if plain and platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    if plain and platform == "cpu" and q.shape[1] * k.shape[1] > BLOCK * BLOCK:
        return "blockwise"
    return "xla"


def _xla(q, k, v, bias, mask, *, causal, scale):
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgnk,bsgk->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += _grouped(bias, G)
    if causal:
        past = jnp.tril(jnp.ones((T, k.shape[1]), bool), k.shape[1] - T)
        mask = past if mask is None else mask & past
    if mask is not None:
        scores = jnp.where(_grouped(mask, G), scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bgnts,bsgk->btgnk", p, v).reshape(B, T, H, K)


def _grouped(a, G):
    """[..., H or 1, T, S] by group [..., G, H / G, T, S], or 1 for both; without heads as it is."""
    if a.ndim < 3:
        return a
    if a.shape[-3] == 1:
        return a[..., None, :, :]
    return a.reshape(*a.shape[:-3], G, -1, *a.shape[-2:])


def _blockwise(q, k, v, *, scale):
    B, T, H, K = q.shape
    G = k.shape[2]
    blocks = -(-T // BLOCK)
    size = -(-T // blocks)  # equal blocks waste less than a full last one
    q = jnp.pad(q * jnp.asarray(scale, q.dtype), ((0, 0), (0, blocks * size - T), (0, 0), (0, 0)))
    q = q.reshape(B, blocks, size, G, H // G, K).transpose(0, 3, 4, 1, 2, 5)
    q = q.reshape(B * G, H // G * blocks, size, K)
    k, v = (a.transpose(0, 2, 1, 3).reshape(B * G, -1, K) for a in (k, v))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the gradient redoes a block's scores
    def block(q, k, v):
        scores = jnp.einsum("tk,sk->ts", q, k, preferred_element_type=jnp.float32)
        p = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("ts,sk->tk", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / p.sum(-1, keepdims=True)).astype(v.dtype)

    def head(qkv):
        q, k, v = qkv
        return lax.map(lambda q: block(q, k, v), q)

    out = lax.map(head, (q, k, v))
    out = out.reshape(B, G, H // G, blocks, size, K).transpose(0, 3, 4, 1, 2, 5)
    return out.reshape(B, blocks * size, H, K)[:, :T]


def _cudnn(q, k, v, *, scale):
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
