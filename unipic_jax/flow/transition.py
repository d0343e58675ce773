"""Stochastic steps of a rectified flow, with the log-probability of where they lead.

A step of any kind is x' = cx x + cv v + s noise. Its numbers are computed once, in float64, and
the rollout and the training run the same code on them. Reference: the public Flow-GRPO code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unipic_jax.core.errors import InputError


class Steps(NamedTuple):
    """What N steps are made of, float32 [N] each, or one of them, scalars."""

    sigma: jax.Array  # the noise level that the velocity is taken at
    dt: jax.Array  # how much the level changes, negative
    cx: jax.Array
    cv: jax.Array
    s: jax.Array  # the deviation of what is added
    precision: jax.Array  # log p = constant - precision * mean (x' - mean)^2; 0 without noise
    constant: jax.Array
    divergence: jax.Array  # KL = divergence * mean (v - v_ref)^2


def make(kind: str, sigmas: np.ndarray, noise: float) -> Steps:
    """The steps of a schedule [N + 1] with a noise level; at 0 those of Euler, for both kinds.

    "sde" follows the flow's marginals in the limit of small steps (Flow-GRPO, equation 9);
    "cps" keeps the coefficients of x0 and noise at every step (Flow-CPS), with the released
    code's log-probability, whose 1 / (2 s^2) is left out. Raises InputError for another kind or
    a level out of range.
    """
    if kind not in KINDS:
        raise InputError(f"steps {kind!r}: choose from {', '.join(KINDS)}")
    if noise < 0 or (kind == "cps" and noise > 1):
        raise InputError(f"noise {noise} is out of range; it is at least 0, and at most 1 for cps")
    levels = np.asarray(sigmas, np.float64)
    sigma, following = levels[:-1], levels[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        std, *numbers = KINDS[kind](sigma, following, noise)
        cx, cv, s, precision, constant = numbers
        divergence = cv**2 / (2 * std**2)
    # A step without noise has no density; zeros let no gradient through.
    scored = [np.where(s > 0, a, 0.0) for a in (precision, constant, divergence)]
    return Steps(*(np.asarray(a, np.float32)
                   for a in (sigma, following - sigma, cx, cv, s, *scored)))


def _sde(sigma, following, noise):
    dt = following - sigma
    # At pure noise the second level stands in for the first, or the deviation would be infinite.
    std = noise * np.sqrt(sigma / (1 - np.where(sigma == 1, following[0], sigma)))
    cx = 1 + std**2 / (2 * sigma) * dt
    cv = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    s = std * np.sqrt(-dt)
    return std, cx, cv, s, 1 / (2 * s**2), -np.log(s) - 0.5 * np.log(2 * np.pi)


def _cps(sigma, following, noise):
    std = following * np.sin(noise * np.pi / 2)
    kept = following * np.cos(noise * np.pi / 2)
    cx = 1 - following + kept
    cv = kept * (1 - sigma) - (1 - following) * sigma
    return std, cx, cv, std, np.ones_like(std), np.zeros_like(std)


KINDS = {"sde": _sde, "cps": _cps}


def mean(step: Steps, x: jax.Array, v: jax.Array) -> jax.Array:
    """Where a step leads without its noise, float32."""
    return step.cx * x.astype(jnp.float32) + step.cv * v.astype(jnp.float32)


def advance(step: Steps, x: jax.Array, v: jax.Array, noise: jax.Array) -> jax.Array:
    """x' of a step from x [B, ...] with the velocity there and standard normal noise; float32."""
    return mean(step, x, v) + step.s * noise


def log_prob(step: Steps, x: jax.Array, v: jax.Array, following: jax.Array) -> jax.Array:
    """The log-probability [B] of `following` after x, the mean over all elements, float32; 0
    where the step has no noise.

    What goes in and the error are kept from being fused with anything around them, so that all
    programs round alike and the ratio of equal policies is exactly 1.
    """
    x, v, following = lax.optimization_barrier((x, v, following))
    error = lax.optimization_barrier(following.astype(jnp.float32) - mean(step, x, v))
    return step.constant - step.precision * jnp.square(error).mean(range(1, error.ndim))


def velocity_gap(v: jax.Array, other: jax.Array) -> jax.Array:
    """Mean squared difference [B] of two velocities, float32."""
    gap = jnp.square(v.astype(jnp.float32) - other.astype(jnp.float32))
    return gap.mean(range(1, gap.ndim))
