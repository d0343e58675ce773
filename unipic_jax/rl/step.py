"""Flow-GRPO as rollout, reward and update: three functions, or one program made of them.

Where the reward can be traced, `jit(make_step(rollout, reward, update))` is the whole step; where
it cannot, `jit(rollout)` and `jit(update)` go with a reward on the host between them. Both are
the same computation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.rl import rollout as rollouts
from unipic_jax.rl.advantage import DEVIATIONS, advantages, diversity
from unipic_jax.rl.learn import Config, Reference, State, make_learn
from unipic_jax.rl.rollout import Policy, Trajectory
from unipic_jax.train.step import Batch

Reward = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, jax.Array]]
"""(what is frozen, batch, latents [B, ...]) -> (reward float32 [B], valid bool [B])"""
Metrics = dict[str, jax.Array]
Rollout = Callable[[State, Tree, Batch, jax.Array], Trajectory]
Update = Callable[..., tuple[State, Metrics]]


def make_rollout(
    cfg: Config, sampling: rollouts.Config, sigmas: np.ndarray, policy: Policy,
    shape: tuple[int, ...],
) -> Rollout:
    """A function (state, frozen, batch, key) -> trajectory of samples of `shape`, with the levels
    [N + 1] of a schedule. The batch may be a part of the whole one (`rollout.concatenate`)."""
    run = rollouts.make_rollout(sampling, sigmas, policy, shape)

    def rollout(state, frozen, batch, key):
        weights = state.params if state.old is None else state.old
        return run(weights, frozen, batch, jax.random.fold_in(key, state.step),
                   state.step // cfg.rounds)

    return rollout


def make_update(
    cfg: Config, sampling: rollouts.Config, sigmas: np.ndarray, policy: Policy,
    reference: Reference | None, optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Update:
    """A function (state, frozen, batch, trajectory, reward [B], valid [B], key) -> (state,
    metrics), to be jitted with its state donated.

    Samples that are not valid are left out; where none is valid the update counts as one that is
    not finite, and changes nothing. Metrics are those of `rl.learn` and of
    `rl.advantage`, with the groups' "diversity". Raises InputError for settings that do not fit
    each other.
    """
    if cfg.deviation not in DEVIATIONS:
        raise InputError(f"deviation {cfg.deviation!r}: choose from {', '.join(DEVIATIONS)}")
    learn = make_learn(cfg, sampling, sigmas, policy, reference, optimizer, schedule)

    def update(state, frozen, batch, trajectory, reward, valid, key):
        advantage, report = advantages(reward, batch["group"], valid, deviation=cfg.deviation)
        report["diversity"] = diversity(trajectory.latents, batch["group"], valid)
        advantage = jnp.where(jnp.any(valid), advantage, jnp.nan)
        # Not the rollout's key, or DiffusionNFT would train on noise that it has sampled with.
        key = jax.random.fold_in(jax.random.fold_in(key, state.step), 1)
        state, figures = learn(state, frozen, batch, trajectory, advantage, key)
        return state, report | figures

    return update


def make_step(
    rollout: Rollout, reward: Reward, update: Update
) -> Callable[[State, Tree, Batch, jax.Array], tuple[State, Metrics]]:
    """The whole step (state, frozen, batch, key) -> (state, metrics)."""

    def step(state, frozen, batch, key):
        trajectory = rollout(state, frozen, batch, key)
        value, valid = reward(frozen, batch, trajectory.latents)
        return update(state, frozen, batch, trajectory, value, valid, key)

    return step
