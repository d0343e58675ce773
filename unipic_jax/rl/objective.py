"""What an update minimizes, a loss for each sample and trained step.

Reference: the public code of Flow-GRPO, GRPO-Guard, TempFlow-GRPO and DiffusionNFT. "Old" is
the policy at the beginning of the update, or the one that sampled.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unipic_jax.flow.transition import Steps, velocity_gap


@dataclasses.dataclass(frozen=True)
class Grpo:
    """The clipped ratio of Flow-GRPO."""

    clip_below: float = 1e-4
    clip_above: float = 1e-4
    kl: float = 0.04  # of the divergence from the reference
    guard: bool = False  # GRPO-Guard's ratio, whose mean does not fall below 1
    noise_weight: bool = False  # TempFlow-GRPO's: steps count as their noise does


@dataclasses.dataclass(frozen=True)
class Nft:
    """DiffusionNFT: no ratio and no stochastic steps; samples are drawn with a slow copy of the
    policy, and velocities are pushed from it towards good samples and away from bad ones."""

    beta: float = 1.0  # how far the two velocities lie from the old one
    kl: float = 1e-4  # of the squared distance to the reference's velocity
    decay: float = 0.5  # of the slow copy, at most
    warmup: float = 1e-3  # by which the decay grows with every rollout


class Anchor(NamedTuple):
    """The old policy at a step."""

    log_prob: jax.Array  # [B]
    velocity: jax.Array | None  # [B, ...], where GRPO-Guard needs it


def log_ratio(
    cfg: Grpo, step: Steps, log_prob: jax.Array, v: jax.Array, old: Anchor
) -> jax.Array:
    """The logarithm [B] of new over old. GRPO-Guard takes out its expectation, minus the squared
    distance of the means, and multiplies with the deviation."""
    difference = log_prob - old.log_prob
    if not cfg.guard:
        return difference
    distance = step.precision * step.cv**2 * velocity_gap(v, old.velocity)
    return step.s * (difference + distance)


def grpo(
    cfg: Grpo, step: Steps, weight: jax.Array, advantage: jax.Array, log_prob: jax.Array,
    v: jax.Array, v_reference: jax.Array | None, old: Anchor,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss [B] at a step, and figures [B] by name.

    log_prob, v: of the policy in training. `weight` is the step's, where noise counts. Where the
    policy is the old one itself the ratio is 1, and its gradient that of log_prob.
    """
    difference = log_prob - old.log_prob
    logarithm = log_ratio(cfg, step, log_prob, v, old)
    ratio = jnp.exp(logarithm)
    inside = jnp.clip(ratio, 1 - cfg.clip_below, 1 + cfg.clip_above)
    policy = jnp.maximum(-advantage * ratio, -advantage * inside)
    if cfg.guard:
        policy /= -step.dt
    if cfg.noise_weight:
        policy *= weight
    loss, figures = policy, {
        "policy_loss": policy, "ratio": ratio, "log_ratio": jnp.abs(logarithm),
        "clip_above": (ratio > 1 + cfg.clip_above).astype(jnp.float32),
        "clip_below": (ratio < 1 - cfg.clip_below).astype(jnp.float32),
        "approx_kl": 0.5 * jnp.square(difference)}
    if v_reference is not None:
        figures["kl"] = step.divergence * velocity_gap(v, v_reference)
        loss += cfg.kl * figures["kl"]
    return loss, figures


def noise_weights(steps: Steps) -> np.ndarray:
    """TempFlow-GRPO's weight float32 [N] of each step: its noise, with mean 1 over all but the
    last."""
    return steps.s / np.maximum(steps.s[:-1].mean(), np.finfo(np.float32).tiny)


def nft(
    cfg: Nft, advantage: jax.Array, x0: jax.Array, x: jax.Array, sigma: jax.Array,
    v: jax.Array, v_old: jax.Array, v_reference: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss [B] of velocities at x = (1 - sigma) x0 + sigma noise, and figures [B] by name.

    sigma [B]. A sample's share r of "good" is 0.5 at advantage 0, and 0 and 1 at the clips.
    """
    level = sigma.reshape(-1, *[1] * (x.ndim - 1))
    dims = range(1, x.ndim)
    r = 0.5 + 0.5 * jnp.clip(advantage / 5, -1, 1)

    def distance(v):
        error = x - level * v - x0
        size = lax.stop_gradient(jnp.abs(error).mean(dims))
        return jnp.square(error).mean(dims) / jnp.maximum(size, 1e-5)

    good = distance((1 - cfg.beta) * v_old + cfg.beta * v)
    bad = distance((1 + cfg.beta) * v_old - cfg.beta * v)
    loss = r * good + (1 - r) * bad
    figures = {"policy_loss": loss, "old_gap": velocity_gap(v, v_old)}
    if v_reference is not None:
        figures["kl"] = velocity_gap(v, v_reference)
        loss += cfg.kl * figures["kl"]
    return loss, figures

