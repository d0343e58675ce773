"""Flow-GRPO as rollout, reward and update: three functions, or one program made of them.

Where the reward can be traced, `jit(make_step(rollout, reward, update))` is the whole step; where
it cannot, `jit(rollout)` and `jit(update)` go with a reward on the host between them. Both are
the same computation.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.flow import transition
from unipic_jax.rl import objective as objectives
from unipic_jax.rl import rollout as rollouts
from unipic_jax.rl.advantage import DEVIATIONS, advantages
from unipic_jax.rl.objective import Anchor, Grpo, Nft
from unipic_jax.rl.rollout import Policy, Trajectory
from unipic_jax.train import state as states
from unipic_jax.train.step import Batch, advance, split

Reward = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, jax.Array]]
"""(what is frozen, batch, latents [B, ...]) -> (reward float32 [B], valid bool [B])"""

Reference = Callable[[Tree, Tree, jax.Array, jax.Array], jax.Array]
"""(what is frozen, conditions, x, sigma) -> velocity: the policy without what trains"""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a rollout is learned from; the defaults are UniPic 2.0's (section 3.2 of its report)."""

    objective: Grpo | Nft = dataclasses.field(default_factory=Grpo)
    deviation: str = "group"  # or "global"; see `rl.advantage`
    updates: int = 1  # parts of a rollout, each of which makes an update
    passes: int = 1  # over all of them
    micro_batches: int = 1  # of a part, whose gradients are summed one after the other
    ema: float = 0.9  # decay of the mean of what trains, 0 for none
    ema_every: int = 8  # updates

    def __post_init__(self):
        if self.deviation not in DEVIATIONS:
            raise InputError(f"deviation {self.deviation!r}: choose from {', '.join(DEVIATIONS)}")
        if min(self.updates, self.passes, self.micro_batches) < 1:
            raise InputError("updates, passes and micro_batches are at least 1")

    @property
    def rounds(self) -> int:
        """Updates a rollout."""
        return self.updates * self.passes


@flax.struct.dataclass
class State(states.State):
    """As in supervised training, where a step is an update."""

    old: Tree | None = None  # DiffusionNFT's slow copy, which samples


def new(cfg: Config, params: Tree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first rollout of training `params`."""
    begin = states.new(params, optimizer, ema=bool(cfg.ema))
    old = jax.tree.map(jnp.copy, params) if isinstance(cfg.objective, Nft) else None
    return State(**{f.name: getattr(begin, f.name) for f in dataclasses.fields(begin)}, old=old)


def make_rollout(
    cfg: Config, sampling: rollouts.Config, sigmas: np.ndarray, policy: Policy,
    shape: tuple[int, ...],
) -> Callable[[State, Tree, Batch, jax.Array], Trajectory]:
    """A function (state, frozen, batch, key) -> trajectory, with the levels [N + 1] of a schedule
    and the shape of one sample; the batch may be a part of the whole one."""
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
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """A function (state, frozen, batch, trajectory, reward [B], valid [B], key) -> (state,
    metrics), to be jitted with its state donated.

    `reference` is needed where the objective weighs a divergence from it. The gradient of each
    update is that of the mean over its samples, those of advantage 0 left out, and trained
    steps, summed in a scan over micro-batches and steps. With one update a rollout the ratio
    is 1 by construction; with more the old log-probabilities are computed before the first by
    the training's own loops, never taken from the rollout, whose program rounds differently.
    Metrics of the updates are float32 [updates], the others scalars. Raises InputError for
    settings that do not fit each other.
    """
    loss = cfg.objective
    if loss.kl and reference is None:
        raise InputError("a divergence from the reference is weighed, and there is no reference")
    if isinstance(loss, Nft) and sampling.guidance_scale > 1:
        raise InputError("DiffusionNFT trains without guidance")
    levels = transition.make(sampling.kind, sigmas, sampling.noise)
    velocity, w = rollouts.guided(policy, sampling), sampling.size
    anchored = isinstance(loss, Grpo) and cfg.rounds > 1
    if reference is None or not loss.kl:
        def reference_velocity(frozen, sample, x, sigma):
            return None
    else:
        off = rollouts.guided(lambda _, *rest: reference(*rest), sampling)

        def reference_velocity(frozen, sample, x, sigma):
            return lax.stop_gradient(off(None, frozen, sample, x, sigma))

    def old_policy(weights, frozen, sample, item):
        log_prob, v = scored(weights, frozen, sample, item)
        return Anchor(log_prob, v if loss.guard else None)

    def scored(weights, frozen, sample, item):
        step = item["step"]
        v = velocity(weights, frozen, sample, item["x"], step.sigma)
        return transition.log_prob(step, item["x"], v, item["following"]), v

    def grpo(weights, old, frozen, sample, item):
        step = item["step"]
        log_prob, v = scored(weights, frozen, sample, item)
        v_reference = reference_velocity(frozen, sample, item["x"], step.sigma)
        each, figures = objectives.grpo(
            loss, step, item["weight"], sample["advantage"], log_prob, v, v_reference,
            item.get("anchor"))
        before = item["anchor"].log_prob if anchored else lax.stop_gradient(log_prob)
        return each, figures | {"mismatch": jnp.abs(before - item["log_prob"])}

    def nft(weights, old, frozen, sample, item):
        x0, (drawn, noise) = sample["latents"], jax.random.split(item["key"])
        # The levels that sampling begins its steps at, the last one's apart.
        index = jax.vmap(lambda i: jax.random.randint(
            jax.random.fold_in(drawn, i), (), 0, len(sigmas) - 2))(sample["id"])
        chosen = (index[:, None] == jnp.arange(len(sigmas) - 1)).astype(jnp.float32)
        sigma = (chosen * levels.sigma).sum(-1)
        s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
        x = (1 - s) * x0 + s * rollouts.normal(noise, sample["id"], x0.shape[1:])
        v = velocity(weights, frozen, sample, x, sigma)
        v_old = lax.stop_gradient(velocity(old, frozen, sample, x, sigma))
        v_reference = reference_velocity(frozen, sample, x, sigma)
        return objectives.nft(loss, sample["advantage"], x0, x, sigma, v, v_old, v_reference)

    each_step = nft if isinstance(loss, Nft) else grpo

    def gradient(params, old, frozen, part, key):
        """Of an update, with the figures [micro-batches, w, b] of its samples and steps."""
        count = jnp.maximum(part["sample"]["mask"].sum(), 1) * w

        def micro(total, now):
            def one(total, item):
                def mean(params):
                    each, figures = each_step(params, old, frozen, now["sample"], item)
                    return (now["sample"]["mask"] * each).sum() / count, {"loss": each} | figures

                slope, figures = jax.grad(mean, has_aux=True)(params)
                return jax.tree.map(jnp.add, total, slope), figures

            return lax.scan(one, total, steps_of(now, key))

        return lax.scan(micro, jax.tree.map(jnp.zeros_like, params), part)

    def steps_of(micro, key):
        """The trained steps of a micro-batch, with a leading axis of them."""
        if isinstance(loss, Nft):
            return {"key": jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(w))}
        x = jnp.moveaxis(micro["x"], 1, 0)
        items = {"x": x[:-1], "following": x[1:], "step": micro["step"],
                 "weight": micro["weight"], "log_prob": jnp.moveaxis(micro["log_prob"], 1, 0)}
        return items | ({"anchor": micro["anchor"]} if "anchor" in micro else {})

    def update(state, frozen, batch, trajectory, reward, valid, key):
        advantage, report = advantages(reward, batch["group"], valid, deviation=cfg.deviation)
        mask = (advantage != 0).astype(jnp.float32)
        sample = {"advantage": advantage, "mask": mask}
        sample = {k: _like(a, trajectory.latents) for k, a in sample.items()}
        sample |= {k: batch[k] for k in ("positive", "negative", "id") if k in batch}
        whole = {"sample": sample}
        if isinstance(loss, Nft):
            sample["latents"] = trajectory.latents
        else:
            whole |= {"x": trajectory.x, "log_prob": trajectory.log_prob}
        parts = jax.tree.map(
            lambda a: _twice(split(a, cfg.updates * cfg.micro_batches), cfg.updates), whole)
        if not isinstance(loss, Nft):
            steps = jax.tree.map(
                lambda a: lax.dynamic_slice_in_dim(jnp.asarray(a), trajectory.start, w),
                {"step": levels, "weight": objectives.noise_weights(levels)})
            parts |= jax.tree.map(lambda a: jnp.broadcast_to(
                a, (cfg.updates, cfg.micro_batches, w)), steps)
        if anchored:
            parts["anchor"] = lax.map(lambda part: lax.map(lambda micro: lax.map(
                lambda item: old_policy(state.params, frozen, micro["sample"], item),
                steps_of(micro, key)), part), parts)

        def one(state, now):
            part, key = now
            slope, figures = gradient(state.params, old, frozen, part, key)
            figures = _figures(figures, part["sample"]["mask"])
            rate = schedule(state.step)
            state, more = advance(state, slope, figures["loss"], optimizer, ema=cfg.ema,
                                  ema_every=cfg.ema_every)
            counts = {k: more.pop(k) for k in ("skipped", "skipped_in_row")}
            return state, (figures | more | {"learning_rate": jnp.float32(rate)}, counts)

        def each_pass(state, key):
            keys = jax.random.split(key, cfg.updates)
            return lax.scan(one, state, (parts, keys))

        old, state = state.old, state.replace(old=None)
        keys = jax.random.split(jax.random.fold_in(key, state.step), cfg.passes)
        iteration = state.step // cfg.rounds
        state, (figures, counts) = lax.scan(each_pass, state, keys)
        figures = {k: a.reshape(cfg.rounds) for k, a in figures.items()}
        report |= {k: a[-1, -1] for k, a in counts.items()}
        if isinstance(loss, Nft):
            eta = jnp.minimum(loss.decay, loss.warmup * iteration)
            slow = jax.tree.map(lambda o, p: p + eta * (o - p), old, state.params)
            state = state.replace(old=slow)
        return state, report | figures

    return update


def make_step(rollout, reward: Reward, update):
    """The whole step (state, frozen, batch, key) -> (state, metrics)."""

    def step(state, frozen, batch, key):
        trajectory = rollout(state, frozen, batch, key)
        value, valid = reward(frozen, batch, trajectory.latents)
        return update(state, frozen, batch, trajectory, value, valid, key)

    return step


def _like(x, batch):
    """x [B] spread over devices as a batch is."""
    spec = meshes.spec_of(batch)
    return x if spec is None else jax.reshard(x, P(spec[0]))


def _twice(x, updates):
    """[updates * M, ...] -> [updates, M, ...]"""
    spec = meshes.spec_of(x)
    out = None if spec is None else P(None, *spec)
    return jnp.reshape(x, (updates, len(x) // updates, *x.shape[1:]), out_sharding=out)


def _figures(figures, mask):
    """Scalars of figures [M, w, b]: means over the samples that count, of whom mask [M, b] tells;
    of the distance between rollout and training also the 99th percentile and the largest."""
    figures = jax.tree.map(meshes.replicate, figures)
    mask = jnp.broadcast_to(meshes.replicate(mask)[:, None], figures["loss"].shape)
    count = jnp.maximum(mask.sum(), 1)
    # An invalid sample's figures may be anything.
    means = {k: jnp.where(mask > 0, a, 0).sum() / count for k, a in figures.items()}
    if "mismatch" in figures:
        means["mismatch_p99"] = jnp.quantile(figures["mismatch"].ravel(), 0.99)
        means["mismatch_max"] = figures["mismatch"].max()
        means["log_ratio_max"] = figures["log_ratio"].max()
        del means["log_ratio"]
    return means
