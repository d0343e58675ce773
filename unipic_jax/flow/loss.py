"""The training loss of rectified flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def velocity_loss(f: Callable, x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Mean squared error [B] of the velocity `f(x_sigma, sigma)` against noise - x0, in float32.

    x0, noise [B, ...]; sigma [B] in (0, 1], one a sample. Unweighted (Stable Diffusion 3,
    equation 3 with the weight of rectified flow).
    """
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    v = f((1 - s) * x0 + s * noise, sigma).astype(jnp.float32)
    error = jnp.square(v - (noise - x0).astype(jnp.float32))
    return error.mean(range(1, error.ndim))
