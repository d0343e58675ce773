"""A stage of reinforcement learning from its config: what trains, by which steps, for what reward.

The config is that of training (`train.config`) with a part `rl`; see `rl.config`.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.data import blocks, feed
from unipic_jax.flow import schedule
from unipic_jax.models import autoencoder, mmdit
from unipic_jax.rl import learn, objective, rollout
from unipic_jax.rl import step as steps
from unipic_jax.rl.rewards import traceable
from unipic_jax.train import objectives
from unipic_jax.train.stage import Stage
from unipic_jax.train.step import Batch

REWARDS = {  # of blocks, by task
    "generate": {"graded": traceable.generation, "exact": traceable.generation_exact},
    "edit": {"graded": traceable.edit, "exact": traceable.edit_exact}}
OBJECTIVES = {"grpo": objective.Grpo, "nft": objective.Nft}


def learning(config) -> learn.Config:
    """How a rollout is learned from; InputError for an objective that is not known."""
    fields = dict(config.rl.learn)
    if config.rl.objective not in OBJECTIVES:
        raise InputError(f"rl.objective {config.rl.objective!r}: choose from "
                         f"{', '.join(OBJECTIVES)}")
    goal = OBJECTIVES[config.rl.objective](**config.rl[config.rl.objective])
    return learn.Config(goal, ema=config.ema, micro_batches=config.micro_batches, **fields)


def sampling(config) -> rollout.Config:
    """How samples are drawn."""
    return rollout.Config(**dict(config.rl.sampling) | {"span": tuple(config.rl.sampling.span)})


def check(config, stage: Stage) -> None:
    """Raises InputError where a stage cannot be reinforced as the config says."""
    if tuple(stage.trained) != ("transformer",) or config.fresh:
        raise InputError("reinforcement trains the transformer, or its adapters, and nothing else")
    if config.rl.task not in REWARDS:
        raise InputError(f"rl.task {config.rl.task!r}: choose from {', '.join(REWARDS)}")
    if odd := set(config.rl.reward) - set(REWARDS[config.rl.task]):
        raise InputError(f"rl.reward {sorted(odd)[0]!r}: choose from "
                         f"{', '.join(REWARDS[config.rl.task])}")
    if config.rl.group < 2 or config.batch % config.rl.group:
        raise InputError(f"a batch of {config.batch} does not divide into groups of "
                         f"{config.rl.group}, which are of 2 or more")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of each rollout: a function of the seed and its number alone, never twice the
    same ones."""

    stage: Stage
    task: str
    count: int  # a rollout
    mesh: jax.sharding.Mesh

    def __call__(self, seed: int, start: int = 0) -> Iterator[tuple[str, Batch]]:
        """This host's part of the prompts of rollout `start` and those after it."""
        collate = self.stage.collate[self.task]
        while True:
            first = start * self.count
            samples = [blocks.sample(self.task, seed, first + i) for i in range(self.count)]
            examples = [s.example for s in samples]
            blank = [dataclasses.replace(e, text="") for e in examples]
            goals = jax.tree.map(lambda *a: np.stack(a), *(s.goal for s in samples))
            whole = collate(examples) | {"goal": goals, "negative": collate(blank)["prompt"]}
            yield self.task, feed.local_rows(self.mesh, whole, self.count)
            start += 1


def make_step(
    config, stage: Stage, optimizer: optax.GradientTransformation, schedule_: optax.Schedule
) -> Callable[[learn.State, Tree, Batch, jax.Array], tuple[learn.State, steps.Metrics]]:
    """The whole step (state, frozen, prompts, key) -> (state, metrics): conditions once a prompt,
    a group of samples of each, their rewards, and the updates.

    Metrics are float32 scalars, means over the updates of a rollout. `frozen` has a "reference",
    the transformer that a divergence is measured from, unless adapters train.
    """
    how, drawing, parts, G = learning(config), sampling(config), stage.parts, config.rl.group
    dtype = jnp.dtype(config.dtype)
    vae, cfg, timing = (parts[n].config for n in ("vae", "transformer", "scheduler"))
    sigmas = schedule.sigmas(timing, drawing.steps)
    side = round(config.data.pixels**0.5) // vae.factor
    score = traceable.weighted([
        (weight, REWARDS[config.rl.task][name]) for name, weight in config.rl.reward.items()])

    def velocity(weights, condition, x, sigma):
        timestep = jnp.broadcast_to(
            sigma * timing.num_train_timesteps, x.shape[:1], out_sharding=_rows(x))
        return mmdit.apply(cfg, weights, x, timestep, **condition, remat=config.remat, dtype=dtype)

    def policy(trained, frozen, condition, x, sigma):
        return velocity(stage.combine(trained, frozen)["transformer"], condition, x, sigma)

    def reference(frozen, condition, x, sigma):
        return velocity(frozen["transformer" if config.lora.rank else "reference"], condition, x,
                        sigma)

    def reward(frozen, batch, latents):
        out = autoencoder.decode(vae, frozen["vae"],
                                 autoencoder.unscale(vae, latents).astype(dtype))
        pictures = jnp.clip(out.astype(jnp.float32) * 0.5 + 0.5, 0, 1)
        value = score(pictures, batch["goal"])
        return value, jnp.isfinite(value)

    def conditions(frozen, prompts):
        found = {"positive": objectives.conditions(parts, frozen, prompts["prompt"], dtype=dtype)}
        if drawing.guidance_scale > 1:
            found["negative"] = objectives.conditions(parts, frozen, prompts["negative"],
                                                      dtype=dtype)
        if "source" in prompts:
            seen = objectives.to_unit(prompts["source"], dtype)
            mode = autoencoder.encode(vae, frozen["vae"], seen).mean.astype(jnp.float32)
            for condition in found.values():
                condition["reference"] = autoencoder.scale(vae, mode)
        return found

    run = steps.make_rollout(how, drawing, sigmas, policy, (side, side, cfg.in_channels))
    update = steps.make_update(how, drawing, sigmas, policy, reference, optimizer, schedule_)
    inner = steps.make_step(run, reward, update)

    def step(state, frozen, prompts, key):
        count = len(prompts["target"])
        batch = jax.tree.map(lambda a: _groups(a, G),
                             conditions(frozen, prompts) | {"goal": prompts["goal"]})
        ids, rows = jnp.arange(count * G), _rows(prompts["target"])
        batch["id"] = ids if rows is None else jax.reshard(ids, rows)
        batch["group"] = batch["id"] // G
        state, report = inner(state, frozen, batch, key)
        report = {name: jnp.mean(a) if a.ndim else a for name, a in report.items()}
        return state, report

    return step


def frozen_reference(config, trained: Tree, frozen: Tree) -> Tree:
    """What is frozen with the reference that `make_step` needs: a copy of what trains, where that
    is not adapters."""
    if config.lora.rank or not config.rl[config.rl.objective].kl:
        return frozen
    whole = {**trained["transformer"], **frozen.get("transformer", {})}
    copied = jax.tree.map(lambda a: a.astype(jnp.dtype(config.dtype)).copy(), whole)
    return frozen | {"reference": copied}


def _groups(a: jax.Array, size: int) -> jax.Array:
    """Rows [P, ...] each so many times: [P * size, ...]."""
    spec = meshes.spec_of(a)
    out = None if spec is None else P(spec[0], *[None] * (a.ndim - 1))
    many = jnp.broadcast_to(a[:, None], (a.shape[0], size, *a.shape[1:]),
                            out_sharding=None if spec is None else P(spec[0], *[None] * a.ndim))
    return jnp.reshape(many, (a.shape[0] * size, *a.shape[1:]), out_sharding=out)


def _rows(x):
    spec = meshes.spec_of(x)
    return None if spec is None else P(spec[0])
