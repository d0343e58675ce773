"""The updates that a rollout with advantages is learned from by: scans over passes, parts,
micro-batches and trained steps, each with a gradient of its own."""

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
from unipic_jax.rl.objective import Anchor, Grpo, Nft
from unipic_jax.rl.rollout import Policy
from unipic_jax.train import state as states
from unipic_jax.train.step import advance, split

Reference = Callable[[Tree, Tree, jax.Array, jax.Array], jax.Array]
"""(what is frozen, conditions, x, sigma) -> velocity: the policy without what trains"""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a rollout is learned from; the defaults are UniPic 2.0's,
    and Flow-GRPO's where it is silent."""

    objective: Grpo | Nft = dataclasses.field(default_factory=Grpo)
    deviation: str = "group"  # or "global"; see `rl.advantage`
    updates: int = 1  # parts of a rollout, each of which makes an update
    passes: int = 1  # over all of them
    micro_batches: int = 1  # of a part, whose gradients are summed one after the other
    # Samples of advantage 0 go to the last micro-batches, and those of nothing else are left out:
    # less work where many groups have equal rewards, for a branch in the program.
    skip_equal: bool = False
    ema: float = 0.9  # decay of the mean of what trains, 0 for none
    ema_every: int = 8  # updates
    keep: float = 0.0  # weight of the divergence from the reference on kept prompts; see `_kept`

    def __post_init__(self):
        if min(self.updates, self.passes, self.micro_batches) < 1:
            raise InputError("updates, passes and micro_batches are at least 1")

    @property
    def rounds(self) -> int:
        """Updates a rollout."""
        return self.updates * self.passes

    @property
    def needs_reference(self) -> bool:
        return bool(self.objective.kl or self.keep)


@flax.struct.dataclass
class State(states.State):
    """As in supervised training, where a step is an update."""

    old: Tree | None = None  # DiffusionNFT's slow copy, which samples


def new(cfg: Config, params: Tree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first rollout of training `params`."""
    begin = states.new(params, optimizer, ema=bool(cfg.ema))
    old = jax.tree.map(jnp.copy, params) if isinstance(cfg.objective, Nft) else None
    return State(**{f.name: getattr(begin, f.name) for f in dataclasses.fields(begin)}, old=old)


def make_learn(
    cfg: Config, sampling: rollouts.Config, sigmas: np.ndarray, policy: Policy,
    reference: Reference | None, optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """A function (state, frozen, batch, trajectory, advantage [B], key) -> (state, metrics).

    The gradient of an update is that of the mean over trained steps and samples, those of
    advantage 0 left out. `reference` is needed where the objective weighs a divergence from it.
    In the first update of a rollout the ratio is 1 by construction; for later ones the old
    log-probabilities are computed before it by the training's own loops, and never taken from the
    rollout, whose program rounds differently. Metrics are float32 [rounds], one an update, but for
    the counts of the state. Raises InputError for settings that do not fit each other.
    """
    if cfg.needs_reference and reference is None:
        raise InputError("a divergence from the reference is weighed, and there is no reference")
    nft = isinstance(cfg.objective, Nft)
    if nft and sampling.guidance_scale > 1:
        raise InputError("DiffusionNFT trains without guidance")
    steps = transition.make(sampling.kind, sigmas, sampling.noise)
    velocity = rollouts.guided(policy, sampling)
    # Called as the policy is, with the weights in training for nothing.
    fixed = rollouts.guided(lambda _, *inputs: reference(*inputs), sampling)
    levels = steps.sigma[slice(*sampling.bounds)]
    loss = (_nft if nft else _grpo)(
        cfg.objective, levels if nft else steps, velocity, fixed if cfg.objective.kl else None)
    kept = jax.grad(_kept(levels, velocity, fixed), has_aux=True)
    anchored = not nft and cfg.rounds > 1

    def items(part, key):
        """What changes from trained step to trained step of a micro-batch, that axis first."""
        if nft:
            return {"key": jax.random.split(key, sampling.size)}
        x = jnp.moveaxis(part["x"], 1, 0)
        found = {"x": x[:-1], "following": x[1:], "index": part["index"],
                 "log_prob": jnp.moveaxis(part["log_prob"], 1, 0)}
        return found | ({"anchor": part["anchor"]} if "anchor" in part else {})

    def anchors(params, frozen, parts):
        def one(sample, item):
            log_prob, v = _score(velocity, steps, params, frozen, sample, item)
            return Anchor(log_prob, v if cfg.objective.guard else None)

        def micro(now):
            return lax.map(lambda item: one(now["sample"], item), items(now, None))

        return lax.map(lambda part: lax.map(micro, part), parts)

    def gradient(params, old, frozen, part, key, first):
        """Of one update, with figures [M, w, b] of its samples at their steps; `first` tells
        whether it is the rollout's first."""
        count = jnp.maximum(part["sample"]["mask"].sum(), 1) * sampling.size

        def micro(total, now):
            sample = now["sample"]

            def one(total, item):
                def mean(params):
                    each, figures = loss(params, old, frozen, sample, item | {"first": first})
                    return (sample["mask"] * each).sum() / count, {"loss": each} | figures

                slope, figures = jax.grad(mean, has_aux=True)(params)
                return jax.tree.map(jnp.add, total, slope), figures

            return lax.scan(one, total, items(now, key))

        def micro_or_nothing(total, now):
            mask = now["sample"]["mask"]
            nothing = jax.tree.map(lambda a: jnp.broadcast_to(jnp.zeros_like(mask), a.shape),
                                   jax.eval_shape(micro, total, now)[1])
            return lax.cond((meshes.replicate(mask) != 0).any(), micro,
                            lambda total, now: (total, nothing), total, now)

        return lax.scan(micro_or_nothing if cfg.skip_equal else micro,
                        jax.tree.map(jnp.zeros_like, params), part)

    def learn(state, frozen, batch, trajectory, advantage, key):
        old, iteration = state.old, state.step // cfg.rounds
        parts = _parts(cfg, sampling, batch, trajectory, advantage)
        if anchored:
            parts["anchor"] = anchors(state.params, frozen, parts)

        def one(state, now):
            part, key = now
            slope, figures = gradient(state.params, old, frozen, part, key,
                                      state.step % cfg.rounds == 0)
            figures = _reduced(figures, part["sample"]["mask"])
            if cfg.keep:
                away, figures["kept_kl"] = kept(state.params, frozen, batch["kept"], key)
                slope = jax.tree.map(lambda s, a: s + cfg.keep * a, slope, away)
            figures["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
            state, more = advance(state, slope, figures["loss"], optimizer, ema=cfg.ema,
                                  ema_every=cfg.ema_every)
            return state, figures | {"grad_norm": more["grad_norm"]}

        def once(state, key):
            return lax.scan(one, state, (parts, jax.random.split(key, cfg.updates)))

        keys = jax.random.split(key, cfg.passes)
        state, figures = lax.scan(once, state.replace(old=None), keys)
        if nft:
            eta = jnp.minimum(cfg.objective.decay, cfg.objective.warmup * iteration)
            state = state.replace(old=jax.tree.map(
                lambda o, p: p + eta * (o - p), old, state.params))
        return state, {k: a.reshape(cfg.rounds) for k, a in figures.items()} | {
            "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}

    return learn


def _score(velocity, steps, params, frozen, sample, item):
    """Log-probability [b] of a recorded step under `params`, and their velocity there."""
    step = _at(steps, item["index"])
    v = velocity(params, frozen, sample, item["x"], step.sigma)
    return transition.log_prob(step, item["x"], v, item["following"]), v


def _still(reference, *inputs):
    """The reference's velocity, where there is one, without a gradient."""
    return None if reference is None else lax.stop_gradient(reference(None, *inputs))


def _at(tree, index):
    return jax.tree.map(lambda a: jnp.asarray(a)[index], tree)


def _grpo(cfg, steps, velocity, reference):
    weights = objectives.noise_weights(steps)

    def loss(params, old, frozen, sample, item):
        step, weight = _at((steps, weights), item["index"])
        log_prob, v = _score(velocity, steps, params, frozen, sample, item)
        v_reference = _still(reference, frozen, sample, item["x"], step.sigma)
        # In a rollout's first update the policy is the old one, whatever programs round.
        own = lax.stop_gradient(Anchor(log_prob, v if cfg.guard else None))
        anchor = jax.tree.map(lambda a, b: jnp.where(item["first"], a, b), own,
                              item.get("anchor", own))
        each, figures = objectives.grpo(
            cfg, step, weight, sample["advantage"], log_prob, v, v_reference, anchor)
        mismatch = jnp.abs(anchor.log_prob - item["log_prob"])
        return each, figures | {"mismatch": mismatch}

    return loss


def _noisy(levels, x0, ids, key):
    """x = (1 - sigma) x0 + sigma noise, and sigma [b], one of the levels."""
    drawn, noise = jax.random.split(key)
    index = jax.vmap(lambda i: jax.random.randint(
        jax.random.fold_in(drawn, i), (), 0, len(levels)))(ids)
    sigma = jnp.where(index[:, None] == jnp.arange(len(levels)), levels, 0).sum(-1)
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0 + s * rollouts.normal(noise, ids, x0.shape[1:]), sigma


def _kept(levels, velocity, reference):
    """How far the velocities of kept edits are from the reference's.

    A stage that learns from captions alone forgets to edit; this holds it where it is not asked to
    change. An edit's result is near its source, which stands in for it, so that none is sampled.
    """
    def divergence(params, frozen, kept, key):
        x, sigma = _noisy(levels, kept["positive"]["reference"], kept["id"], key)
        gap = transition.velocity_gap(velocity(params, frozen, kept, x, sigma),
                                      _still(reference, frozen, kept, x, sigma)).mean()
        return gap, gap

    return divergence


def _nft(cfg, levels, velocity, reference):
    def loss(params, old, frozen, sample, item):
        x0 = sample["latents"]
        x, sigma = _noisy(levels, x0, sample["id"], item["key"])
        v = velocity(params, frozen, sample, x, sigma)
        v_old = lax.stop_gradient(velocity(old, frozen, sample, x, sigma))
        v_reference = _still(reference, frozen, sample, x, sigma)
        return objectives.nft(cfg, sample["advantage"], x0, x, sigma, v, v_old, v_reference)

    return loss


def _parts(cfg, sampling, batch, trajectory, advantage):
    """All that is learned from, [updates, micro-batches, b, ...]."""
    spec = meshes.spec_of(trajectory.latents)
    if spec is not None:
        advantage = jax.reshard(advantage, P(spec[0]))
    sample = {k: batch[k] for k in ("positive", "negative", "id") if k in batch}
    sample |= {"advantage": advantage, "mask": (advantage != 0).astype(jnp.float32)}
    whole = {"sample": sample}
    if isinstance(cfg.objective, Nft):
        sample["latents"] = trajectory.latents
    else:
        whole |= {"x": trajectory.x, "log_prob": trajectory.log_prob}
    if cfg.skip_equal:
        whole = _gathered(whole, sample["mask"], cfg.updates, cfg.micro_batches)

    def cut(x):
        x = split(x, cfg.updates * cfg.micro_batches)
        spec = meshes.spec_of(x)
        return jnp.reshape(x, (cfg.updates, cfg.micro_batches, *x.shape[1:]),
                           out_sharding=None if spec is None else P(None, *spec))

    parts = jax.tree.map(cut, whole)
    if not isinstance(cfg.objective, Nft):
        parts["index"] = jnp.broadcast_to(
            trajectory.start + jnp.arange(sampling.size),
            (cfg.updates, cfg.micro_batches, sampling.size))
    return parts


def _gathered(tree, mask, updates, micro_batches):
    """The samples in the order by which `split` fills the first micro-batches of all updates with
    those that mask [B] tells of; each device's samples stay on it."""
    spec, devices = meshes.spec_of(mask), meshes.row_parts(mask)
    rows = None if spec is None else P(spec[0])
    own = len(mask) // devices
    filled = np.arange(own).reshape(micro_batches, -1, updates).transpose(1, 2, 0).ravel()

    def of_devices(x):
        return jnp.reshape(x, (devices, own, *x.shape[1:]), out_sharding=rows)

    order = jnp.argsort(of_devices(mask) == 0, axis=1, stable=True)[:, filled]

    def gathered(x):
        found = jax.vmap(lambda x, order: x[order])(of_devices(x), order)
        return jnp.reshape(found, x.shape, out_sharding=rows)

    return jax.tree.map(gathered, tree)


def _reduced(figures, mask):
    """Scalars of figures [M, w, b]: means over the samples that count, of whom mask [M, b] tells;
    of what has to be small also the largest, and of the mismatch the 99th percentile."""
    figures = jax.tree.map(meshes.replicate, figures)
    counts = jnp.broadcast_to(meshes.replicate(mask)[:, None], figures["loss"].shape) > 0

    def among(a, other):  # an invalid sample's figures may be anything
        return jnp.where(counts, a, other)

    reduced = {k: among(a, 0).sum() / jnp.maximum(counts.sum(), 1)
               for k, a in figures.items() if k != "log_ratio"}
    if "mismatch" in figures:
        reduced["mismatch_p99"] = jnp.where(
            counts.any(), jnp.nanquantile(among(figures["mismatch"], jnp.nan), 0.99), 0)
        reduced["mismatch_max"] = among(figures["mismatch"], 0).max()
        reduced["log_ratio_max"] = among(figures["log_ratio"], 0).max()
    return reduced
