"""TPUs' splash attention, from JAX's own library of kernels: scores never leave the chip's vector
memory, in the gradient neither."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from unipic_jax.core.remat import ATTENTION

LANES = 128  # sequences are padded to multiples of this
BLOCK = 512  # queries, and keys, a block at most; larger ones waste more of their padding
HEAD = 64  # sizes of heads are padded to multiples of this
WIDE = 5  # blocks of keys at most that a part of the gradient of the queries is of


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array | None = None,
    keys: jax.Array | None = None, *, causal: bool, scale: float, interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v, as `core.attention` has it, on one device.

    queries [B, T] and keys [B, S], int of 0 or more, are the segments; each query has a key of its
    own. `interpret` runs the kernel on any platform, slowly. What the gradient needs of the
    forward kernel is named for `core.remat`, so that it need not run twice.
    """
    (B, T, H, K), S = q.shape, k.shape[1]
    (t, block_q), (s, block_k) = map(_padded, (T, S))
    # One kernel makes all gradients. Those of the queries come in parts, one a wide block of keys,
    # and are summed outside of it.
    wide = block_k * max(n for n in range(1, WIDE + 1) if s // block_k % n == 0)

    def heads_first(x, length):  # [B, T, H, K] -> [B, H, length, K]
        padding = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -K % HEAD))
        return jnp.pad(x, padding).swapaxes(1, 2)

    # No query is of the segment of keys that pad; queries that pad do as the last one does, for
    # the gradient of one that attends nowhere is not finite.
    if queries is None:
        queries, keys = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    segments = kernels.SegmentIds(
        jnp.pad(queries.astype(jnp.int32), ((0, 0), (0, t - T)), mode="edge"),
        jnp.pad(keys.astype(jnp.int32), ((0, 0), (0, s - S)), constant_values=-1))
    allowed = masks.CausalMask((t, s), S - T) if causal else masks.FullMask((t, s))
    make = functools.partial(
        kernels.make_splash_mha, masks.MultiHeadMask([allowed] * H), head_shards=1,
        q_seq_shards=1, interpret=interpret, block_sizes=kernels.BlockSizes(
            block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=wide,
            block_kv_dkv_compute=block_k, use_fused_bwd_kernel=True))

    def flat(out):  # [B, H, t, K] -> [B, T, H * K]
        return out.swapaxes(1, 2)[:, :T, :, :K].reshape(B, T, H * K)

    # The library's own gradient keeps the output as the kernel writes it, whose small heads are
    # padded to twice their size in memory. Here it is kept flat; the library has no public name for
    # the kernel of the gradients.
    @jax.custom_vjp
    def attend(kernel, q, k, v, segments):
        return flat(jax.vmap(make())(q, k, v, segments))

    def forward(kernel, q, k, v, segments):
        out, (logsumexp,) = jax.vmap(kernel)(q, k, v, segments)
        out, logsumexp = (checkpoint_name(a, ATTENTION) for a in (flat(out), logsumexp))
        return out, (kernel, q, k, v, segments, out, logsumexp)

    def backward(kept, slope):
        kernel, q, k, v, segments, out, logsumexp = kept
        out, slope = (heads_first(a.reshape(B, T, H, K), t) for a in (out, slope))

        def gradients(q, k, v, segments, out, logsumexp, slope):
            kept = q, k, v, segments, None, out, logsumexp, None, kernel.dkv_mask_info
            return kernels._splash_attention_bwd(**kernel.kwargs, res=kept, do=slope)[3:6]

        return None, *jax.vmap(gradients)(q, k, v, segments, out, logsumexp, slope), None

    attend.defvjp(forward, backward)
    q = heads_first(q * jnp.asarray(scale, q.dtype), t)
    out = attend(make(save_residuals=True), q, heads_first(k, s), heads_first(v, s), segments)
    return out.reshape(B, T, H, K)


def _padded(length: int) -> tuple[int, int]:
    """A length in whole blocks, and the size of a block: equal ones waste least."""
    blocks = -(-length // BLOCK)
    size = -(-length // (blocks * LANES)) * LANES
    return blocks * size, size
