"""Group-relative advantages, and how much the pictures of a group differ."""

import jax
import jax.numpy as jnp

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError

EPS = 1e-4  # added to the deviation
CLIP = 5.0  # the largest size of an advantage
DEVIATIONS = ("group", "global")


def advantages(
    reward: jax.Array, group: jax.Array, valid: jax.Array, *, deviation: str = "group"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(reward - the group's mean) / (deviation + EPS), clipped, float32 [B]; and what to report.

    reward float32 [B], group int32 [B] below B, valid bool [B]. The deviation is that of the
    population of the group, or ("global") of all rewards. Samples that are not valid count
    nowhere and have advantage 0; so has a group of equal rewards, exactly. Computed on every
    device alike, so that their number changes nothing. Raises InputError for another deviation.
    """
    if deviation not in DEVIATIONS:
        raise InputError(f"deviation {deviation!r}: choose from {', '.join(DEVIATIONS)}")
    reward, group, valid = map(meshes.replicate, (reward, group, valid))
    B, there = len(reward), valid.astype(jnp.float32)
    # An invalid reward may be NaN, which no product with 0 removes.
    reward = jnp.where(valid, reward.astype(jnp.float32), 0)

    def total(x):
        return jax.ops.segment_sum(x, group, B)

    count = total(there)
    members = jnp.maximum(count, 1)
    # Measured from the group's least, so that equal rewards differ from their mean by nothing.
    least = jax.ops.segment_min(jnp.where(valid, reward, jnp.inf), group, B)
    above = jnp.where(valid, reward - least[group], 0)
    centred = jnp.where(valid, above - (total(above) / members)[group], 0)
    spread = jnp.sqrt(total(jnp.square(centred)) / members)

    everyone = jnp.maximum(there.sum(), 1)
    mean = reward.sum() / everyone
    overall = jnp.sqrt((there * jnp.square(reward - mean)).sum() / everyone)
    advantage = centred / ((spread[group] if deviation == "group" else overall) + EPS)
    groups = jnp.maximum((count > 0).sum(), 1)
    return jnp.clip(advantage, -CLIP, CLIP), {
        "reward": mean,
        "reward_std": overall,
        "group_std": spread.sum() / groups,
        "collapsed": ((count > 0) & (spread == 0)).sum() / groups,
        "valid": there.mean(),
    }


def diversity(latents: jax.Array, group: jax.Array, valid: jax.Array) -> jax.Array:
    """How much the samples [B, ...] of a group differ: the root of the mean square of their
    distance from the group's mean, a scalar; 0 where all pictures of each group are the same."""
    latents, group, valid = map(meshes.replicate, (latents, group, valid))
    B, there = len(latents), valid.astype(jnp.float32)
    x = jnp.where(valid[:, None], latents.reshape(B, -1), 0)
    members = jnp.maximum(jax.ops.segment_sum(there, group, B), 1)
    mean = jax.ops.segment_sum(x, group, B) / members[:, None]
    squares = jnp.square(x - mean[group]).mean(-1)
    return jnp.sqrt((there * squares).sum() / jnp.maximum(there.sum(), 1))
