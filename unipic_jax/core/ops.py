"""The layers every model is made of. Weights are cast to the type of the activations, gathered
along `fsdp` where they are used, and normalizations are computed in float32."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core import quantize


def linear(p: dict, x: jax.Array) -> jax.Array:
    """x [..., D_in] @ kernel [D_in, D_out] (+ bias [D_out]), and where an adapter is joined
    (`core.lora`), + x @ lora_a [D_in, r] @ lora_b [r, D_out]."""
    y = _matmul(x, p["kernel"])
    if "lora_a" in p:
        y += _matmul(_matmul(x, p["lora_a"]), p["lora_b"])
    return y + meshes.gather(p["bias"].astype(x.dtype)) if "bias" in p else y


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    kernel = quantize.dense(kernel, x.dtype)
    xs, ks = meshes.spec_of(x), meshes.spec_of(kernel)
    out = None
    if xs is not None and xs[-1] is not None:
        out = P(*xs[:-1], None if ks[1] == "fsdp" else ks[1])
    return _product(x, kernel, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, out):
    return jnp.einsum("...d,df->...f", x, meshes.gather(kernel), out_sharding=out)


def _product_forward(x, kernel, out):
    return _product(x, kernel, out), (x, kernel)


def _product_backward(out, kept, g):
    """As JAX has it, but for the kernel's gradient: JAX makes its transpose, and a CPU then
    transposes all of g for that; and it sums it on every device before it is split."""
    x, kernel = kept
    dx = jnp.einsum("...f,df->...d", g, meshes.gather(kernel), out_sharding=meshes.spec_of(x))
    return dx, meshes.summed(functools.partial(jnp.einsum, "...d,...f->df"), x, g, kernel)


_product.defvjp(_product_forward, _product_backward)


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """x [B, ...] to shape [B, ...], where only the batch axis is spread over devices."""
    spec = meshes.spec_of(x)
    out = None if spec is None else P(spec[0], *[None] * (len(shape) - 1))
    return jnp.reshape(x, shape, out_sharding=out)


def feed_forward(p: dict, x: jax.Array, act) -> jax.Array:
    """down(act(up(x))), and where p has a gate down(act(gate(x)) * up(x)), of x [B, ..., D].

    By rows [B ..., D], as a CPU takes products: what stands between two of them would be slow there
    over other axes than theirs.
    """
    spec = meshes.spec_of(x)
    y = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=spec and P(spec[0], spec[-1]))
    up = linear(p["up"], y)
    y = linear(p["down"], act(linear(p["gate"], y)) * up if "gate" in p else act(up))
    return jnp.reshape(y, x.shape, out_sharding=spec)


def embed(table: jax.Array, ids: jax.Array, dtype) -> jax.Array:
    """Rows of `table` [V, D] at `ids` [B, S] -> [B, S, D]."""
    spec = meshes.spec_of(ids)
    out = None if spec is None else P(*spec, None)
    return meshes.replicate(table.astype(dtype)).at[ids].get(mode="clip", out_sharding=out)


def layer_norm(x: jax.Array, p: dict | None = None, *, eps: float) -> jax.Array:
    """Layer normalization over the last axis, affine where `p` is given."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y if p is None else y * p["scale"] + p["bias"]).astype(x.dtype)


def rms_norm(x: jax.Array, p: dict, *, eps: float) -> jax.Array:
    """Root-mean-square normalization over the last axis, times a scale."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * p["scale"].astype(x.dtype)


def group_norm(x: jax.Array, p: dict, *, groups: int, eps: float) -> jax.Array:
    """Group normalization of [B, h, w, C] over space and C / groups channels."""
    y = x.astype(jnp.float32)
    # Per channel first, then over the channels of a group: no reshape of the picture.
    mean = jnp.repeat(y.mean((1, 2)).reshape(y.shape[0], groups, -1).mean(-1),
                      y.shape[-1] // groups, -1)
    y = y - mean[:, None, None]
    var = jnp.repeat((y * y).mean((1, 2)).reshape(y.shape[0], groups, -1).mean(-1),
                     y.shape[-1] // groups, -1)
    y = y * (lax.rsqrt(var + eps) * p["scale"])[:, None, None] + p["bias"]
    return y.astype(x.dtype)


def conv(p: dict, x: jax.Array, *, stride: int = 1, padding=None) -> jax.Array:
    """Convolution of [B, h, w, C_in] with kernel [k, k, C_in, C_out]; "same" by default."""
    kernel = meshes.gather(p["kernel"].astype(x.dtype))
    y = lax.conv_general_dilated(x, kernel, (stride, stride), padding or "SAME",
                                 dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["bias"].astype(x.dtype)


SMALL = 2**25  # bytes of a stack of layers


def scan_layers(layer, carry, stack):
    """`lax.scan` over stacked layers; small stacks are written out on a CPU, where XLA copies each
    layer's weights out of its stack and is slower inside loops."""
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(stack))
    small = jax.default_backend() == "cpu" and size <= SMALL
    return lax.scan(layer, carry, stack, unroll=small)


ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def timestep_embedding(t: jax.Array, width: int) -> jax.Array:
    """Sinusoids of t [B] (in thousandths of the path), cosines first -> float32 [B, width]."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
