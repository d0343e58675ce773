"""Attention behind one function: plain XLA, blockwise, or the fused kernels of GPUs and TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core.remat import ATTENTION
from unipic_jax.core.splash import LANES, splash

BLOCK = 256  # queries a block: a head's scores for them stay in a core's cache
REFUSED = {"xla": (), "blockwise": ("bias",), "cudnn": ("bias", "mask", "causal", "segments"),
           "splash": ("bias", "mask")}
"""The implementations, and what each cannot do."""


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    causal: bool = False, bias: jax.Array | None = None, mask: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None, scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v, with the softmax in float32.

    q [B, T, H, K]; k, v [B, S, G, K], where G divides H (grouped queries); bias and mask (bool,
    True where a query may attend) broadcast to [B, H, T, S]; segments, int [B, T] and [B, S], let
    a query attend to keys of its own number; causal, with T < S, takes the queries for the last T.
    A query that may attend nowhere gets the mean of v, from "splash" anything; scale is 1/sqrt(K)
    unless given. Returns [B, T, H, K] in the type of q.
    `implementation`: "xla" holds all scores; "blockwise" never holds more than those of `BLOCK`
    queries of a head, in the gradient neither, and takes no bias; "cudnn" is NVIDIA's kernel, in
    half precision, without bias, mask, segments or causal; "splash" is the TPU's (`core.splash`),
    without bias or mask. By default the best of them for the platform, the type and the length.
    Raises ValueError for an unknown implementation or one that cannot do what is asked.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    asked = {"bias": bias is not None, "mask": mask is not None, "causal": causal,
             "segments": segments is not None}
    implementation = implementation or _choose(q, k, {n for n in asked if asked[n]})
    if implementation not in REFUSED:
        raise ValueError(f"attention implementation {implementation!r}: choose from "
                         f"{', '.join(REFUSED)}")
    if any(asked[name] for name in REFUSED[implementation]):
        raise ValueError(f"{implementation} attention takes no "
                         f"{' or '.join(REFUSED[implementation])}; use xla")
    if segments is not None and implementation != "splash":
        same = (segments[0][:, :, None] == segments[1][:, None])[:, None]
        mask, segments = same if mask is None else mask & same, None
    if implementation == "xla":
        return checkpoint_name(_xla(q, k, v, bias, mask, causal=causal, scale=scale), ATTENTION)
    if implementation == "cudnn":
        local, more = functools.partial(_cudnn, scale=scale), ()
    elif implementation == "splash":
        local, more = functools.partial(splash, causal=causal, scale=scale), segments or ()
    else:
        local = functools.partial(_blockwise, causal=causal, scale=scale)
        more = () if mask is None else (mask[(None,) * (4 - mask.ndim)],)
    out = _on_each_device(local, q, k, v, *more, check_vma=implementation != "splash")
    fused = implementation in ("cudnn", "splash")  # keeps more, which `core.remat` knows
    return out if fused else checkpoint_name(out, ATTENTION)


def _on_each_device(local, q, k, v, *more, check_vma):
    """local(q, k, v, *more) on the devices' own sequences and heads."""
    spec = meshes.spec_of(q)
    if spec is None:
        return local(q, k, v, *more)
    spec = P(spec[0], None, spec[2], None)  # whole sequences and heads on each device
    specs = [spec] * 3 + [P(spec[0], None) if a.ndim == 2 else P(
        *(n if d > 1 else None for n, d in zip((spec[0], spec[2]), a.shape)), None, None)
        for a in more]
    # Splash's kernels do not say over which axes their outputs vary.
    return jax.shard_map(local, in_specs=tuple(specs), out_specs=spec, check_vma=check_vma)(
        *(jax.reshard(a, s) for a, s in zip((q, k, v, *more), specs)))


def _choose(q, k, asked: set[str]) -> str:
    T, S = q.shape[1], k.shape[1]
    platform, able = meshes.platform(), {n for n in REFUSED if not asked & {*REFUSED[n]}}
    if platform == "gpu" and "cudnn" in able and q.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    if platform == "tpu" and "splash" in able and T >= LANES:
        return "splash"
    if platform == "cpu" and "blockwise" in able and T * S > BLOCK * BLOCK:
        return "blockwise"
    return "xla"


def _xla(q, k, v, bias, mask, *, causal, scale):
    B, T, H, K = q.shape
    G = k.shape[2]
    # Heads before positions, in so many words: a CPU's products are slower the other way round.
    q = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    scores = jnp.einsum("bgntk,bgsk->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += _grouped(bias, G)
    if causal:
        past = jnp.tril(jnp.ones((T, k.shape[2]), bool), k.shape[2] - T)
        mask = past if mask is None else mask & past
    if mask is not None:
        scores = jnp.where(_grouped(mask, G), scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, -1).astype(v.dtype)
    out = jnp.einsum("bgnts,bgsk->bgntk", p, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _grouped(a, G):
    """[..., H or 1, T, S] by group [..., G, H / G, T, S], or 1 for both; without heads as it is."""
    if a.ndim < 3:
        return a
    if a.shape[-3] == 1:
        return a[..., None, :, :]
    return a.reshape(*a.shape[:-3], G, -1, *a.shape[-2:])


def _blockwise(q, k, v, mask=None, *, causal, scale):
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    blocks = -(-T // BLOCK)
    size = -(-T // blocks)  # equal blocks waste less than a full last one
    q = jnp.pad(q * jnp.asarray(scale, q.dtype), ((0, 0), (0, blocks * size - T), (0, 0), (0, 0)))
    q = q.reshape(B, blocks, size, G, H // G, K).transpose(0, 3, 4, 1, 2, 5)
    q = q.reshape(B * G, H // G * blocks, size, K)
    k, v = (a.transpose(0, 2, 1, 3).reshape(B * G, S, K) for a in (k, v))
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, blocks * size - T), (0, 0)))

    def allowed(head, number):
        """The mask of a block of queries of a group [t, s], or what broadcasts to it."""
        first = number % blocks * size
        past = jnp.arange(S) <= first + jnp.arange(size)[:, None] + S - T if causal else None
        if mask is None:
            return past
        rows = min(size, mask.shape[2])
        at = (head // G % mask.shape[0], (head % G * (H // G) + number // blocks) % mask.shape[1],
              first if rows > 1 else 0, 0)
        part = lax.dynamic_slice(mask, at, (1, 1, rows, mask.shape[3]))[0, 0]
        return part if past is None else part & past

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the gradient redoes a block's scores
    def block(q, k, v, head, number):
        scores = jnp.einsum("tk,sk->ts", q, k, preferred_element_type=jnp.float32)
        if (may := allowed(head, number)) is not None:
            scores = jnp.where(may, scores, jnp.finfo(jnp.float32).min)
        p = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("ts,sk->tk", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / p.sum(-1, keepdims=True)).astype(v.dtype)

    def group(numbered):
        q, k, v, head = numbered
        return lax.map(lambda a: block(a[0], k, v, head, a[1]), (q, jnp.arange(len(q))))

    out = lax.map(group, (q, k, v, jnp.arange(B * G)))
    out = out.reshape(B, G, H // G, blocks, size, K).transpose(0, 3, 4, 1, 2, 5)
    return out.reshape(B, blocks * size, H, K)[:, :T]


def _cudnn(q, k, v, *, scale):
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
