"""A policy that is linear in what trains, and the update by hand in float64 for it."""

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.core import ops
from unipic_jax.flow import schedule

D, N, B, GROUP = 4, 10, 16, 4
SIGMAS = schedule.sigmas(schedule.Config(1000, 3.0), N)
SHAPE = (D,)


def policy(trained, frozen, condition, x, sigma):
    """x W + c C, and a row of its own at each noise level, by whose gradient one sees which steps
    train."""
    level = jnp.broadcast_to(sigma, x.shape[:1])[:, None]
    at = (jnp.abs(level - SIGMAS[:-1]) < 1e-5).astype(x.dtype)
    return (ops.linear({"kernel": trained["w"]}, x) + condition["c"] @ frozen["c"]
            + ops.linear({"kernel": trained["rows"]}, at))


def by_hand(trained, frozen, batch, x, i, scale=1.0):
    """The velocity [B, D] at step i in float64, guided."""
    w, rows, c = (np.asarray(a, np.float64) for a in (trained["w"], trained["rows"], frozen["c"]))
    positive, negative = (batch[n]["c"].astype(np.float64) @ c for n in ("positive", "negative"))
    return x @ w + rows[i] + negative + scale * (positive - negative)


def reference(frozen, condition, x, sigma):
    return policy(frozen["initial"], frozen, condition, x, sigma)


def make(seed=0):
    """(what trains, what is frozen, batch)."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return draw.normal(size=shape).astype(np.float32)

    trained = {"w": 0.3 * normal(D, D), "rows": 0.1 * normal(N, D)}
    initial = jax.tree.map(lambda a: a + 0.05 * normal(*a.shape), trained)
    batch = {"positive": {"c": normal(B, 3)}, "negative": {"c": normal(B, 3)},
             "group": np.arange(B, dtype=np.int32) // GROUP, "id": np.arange(B, dtype=np.int32)}
    return trained, {"c": normal(3, D), "initial": initial}, batch


def reward(frozen, batch, latents):
    """The mean, all valid."""
    value = latents.mean(1)
    return value, jnp.isfinite(value)
