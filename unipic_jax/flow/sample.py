"""The sampler: Euler steps of dx/dsigma = velocity, as one scan."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x [B, ...], sigma scalar, step index scalar) -> dx/dsigma [B, ...]"""


def sample(velocity: Velocity, x: jax.Array, sigmas: jax.Array, first: int | jax.Array = 0):
    """Carry x [B, ...] from noise level sigmas[0] to sigmas[-1] ([n + 1] for n steps).

    `first` is the index of the first step within the whole schedule, for velocities that depend
    on it. The state is float32 between steps whatever the velocity is computed in.
    """

    def step(x, s):
        sigma, following, index = s
        v = velocity(x, sigma, index).astype(jnp.float32)
        return x + (following - sigma) * v, None

    index = first + jnp.arange(sigmas.shape[0] - 1)
    return lax.scan(step, x.astype(jnp.float32), (sigmas[:-1], sigmas[1:], index))[0]
