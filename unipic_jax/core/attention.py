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
    causal: bool = False, bias: jax.Array | None = None, scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v, with the softmax in float32.

    q [B, T, H, K]; k, v [B, S, G, K], where G divides H (grouped queries); bias broadcasts to
    [B, H, T, S]; scale is 1/sqrt(K) unless given. Returns [B, T, H, K] in the type of q.
    `implementation`: "xla" holds all scores; "blockwise" never holds more than those of `BLOCK`
    queries of a head, in the gradient neither; "cudnn" is NVIDIA's kernel, in half precision.
    By default the best of them for the platform, the type and the length.
    Raises ValueError for an unknown implementation or one that cannot do what is asked.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = bias is None and not causal
    implementation = implementation or _choose(q, k, plain)
    if implementation == "xla":
        f = functools.partial(_xla, causal=causal, scale=scale)
        return f(q, k, v, bias)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: choose from "
                         f"{', '.join(IMPLEMENTATIONS)}")
    if not plain:
        raise ValueError(f"{implementation} attention takes neither bias nor causal; use xla")
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


def _xla(q, k, v, bias, *, causal, scale):
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgnk,bsgk->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:-3], H, *bias.shape[-2:]))
        scores += bias.reshape(*bias.shape[:-3], G, H // G, *bias.shape[-2:])
    if causal:
        mask = jnp.tril(jnp.ones((T, k.shape[1]), bool), k.shape[1] - T)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bgnts,bsgk->btgnk", p, v).reshape(B, T, H, K)


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
