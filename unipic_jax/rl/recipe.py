"""A stage of reinforcement learning from its config: what trains, by which steps, for what reward.

The config is that of training (`train.config`) with a part `rl`; see `rl.config`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.flow import schedule
from unipic_jax.model import Part
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
TASKS = {"edit": ("edit",), "generate": ("generate",), "both": ("edit", "generate")}
JUDGE = "judge"  # the reward of edits that the config's judge gives
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


def check(config, stage: Stage, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError where a stage cannot be reinforced on a mesh as the config says."""
    if tuple(stage.trained) != ("transformer",) or config.fresh:
        raise InputError("reinforcement trains the transformer, or its adapters, and nothing else")
    if config.rl.task not in TASKS:
        raise InputError(f"rl.task {config.rl.task!r}: choose from {', '.join(TASKS)}")
    if config.rl.prompts and not config.rl.server.url and set(config.rl.reward) != {JUDGE}:
        raise InputError("rl.prompts of a file need a reward server, rl.server.url, or a judge; "
                         "the rewards of blocks know only blocks")
    tasks = TASKS[config.rl.task]
    known = [*REWARDS[tasks[0]], *[JUDGE] * (config.rl.task == "edit")]
    odd = set(config.rl.reward) - set(known)
    if odd and not config.rl.server.url:
        raise InputError(f"rl.reward {sorted(odd)[0]!r}: choose from {', '.join(known)}")
    if config.rl.learn.keep and config.rl.task != "generate":
        raise InputError("rl.learn.keep holds edits while captions are learned from; "
                         f"rl.task is {config.rl.task}")
    if config.rl.learn.keep and config.rl.prompts and not config.rl.kept.prompts:
        raise InputError("rl.learn.keep needs edits to hold beside the prompts of a file: "
                         "--config.rl.kept.prompts=EDITS.jsonl")
    if JUDGE in config.rl.reward and not config.judge:
        raise InputError("the reward of a judge needs its folder: --config.judge=DIR")
    if config.rl.group < 2 or config.batch % config.rl.group:
        raise InputError(f"a batch of {config.batch} does not divide into groups of "
                         f"{config.rl.group}, which are of 2 or more")
    updates, devices = learning(config).updates, mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch % (updates * config.micro_batches * devices):
        raise InputError(f"a batch of {config.batch} does not divide into {updates} updates of "
                         f"{config.micro_batches} micro-batches over {devices} devices")


class Functions(NamedTuple):
    """What a step is made of; the last two are those of `rl.step`."""

    prepare: Callable[[Tree, Batch], Batch]
    """(what is frozen, prompts) -> the batch of all samples: conditions once a row of the prompts,
    and as many samples of each as make the batch"""
    decode: Callable[[Tree, jax.Array], jax.Array]
    """(what is frozen, latents [B, ...]) -> pictures float32 [B, H, W, 3] in [0, 1]"""
    rollout: steps.Rollout
    update: steps.Update


def functions(
    config, stage: Stage, optimizer: optax.GradientTransformation, schedule_: optax.Schedule
) -> Functions:
    """The functions of a stage, none of them jitted.

    `frozen` has a "reference", the transformer that a divergence is measured from, unless adapters
    train.
    """
    how, drawing, parts, G = learning(config), sampling(config), stage.parts, config.rl.group
    dtype = jnp.dtype(config.dtype)
    vae, cfg, timing = (parts[n].config for n in ("vae", "transformer", "scheduler"))
    sigmas = schedule.sigmas(timing, drawing.steps)
    side = picture_side(config) // vae.factor

    def velocity(weights, condition, x, sigma):
        timestep = jnp.broadcast_to(
            sigma * timing.num_train_timesteps, x.shape[:1], out_sharding=_rows(x))
        return mmdit.apply(cfg, weights, x, timestep, **condition, remat=config.remat, dtype=dtype)

    def policy(trained, frozen, condition, x, sigma):
        return velocity(stage.combine(trained, frozen)["transformer"], condition, x, sigma)

    def reference(frozen, condition, x, sigma):
        return velocity(frozen["transformer" if config.lora.rank else "reference"], condition, x,
                        sigma)

    def decode(frozen, latents):
        out = autoencoder.decode(vae, frozen["vae"],
                                 autoencoder.unscale(vae, latents).astype(dtype))
        return jnp.clip(out.astype(jnp.float32) * 0.5 + 0.5, 0, 1)

    def encode(frozen, prompts):
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

    def numbered(batch):
        first = jax.tree.leaves(batch)[0]
        ids, rows = jnp.arange(len(first)), _rows(first)
        return batch | {"id": ids if rows is None else jax.reshard(ids, rows)}

    def prepare(frozen, prompts):
        found = encode(frozen, prompts)
        found |= {name: prompts[name] for name in ("goal", "judge") if name in prompts}
        if "judge" in prompts:
            found["source"] = prompts["source"]
        rows = len(jax.tree.leaves(found)[0])  # more than groups, where there are copies
        batch = numbered(jax.tree.map(lambda a: _groups(a, config.batch // rows), found))
        batch["group"] = batch["id"] // G
        if "kept" in prompts:
            batch["kept"] = numbered(encode(frozen, prompts["kept"]))
        return batch

    return Functions(
        prepare, decode,
        steps.make_rollout(how, drawing, sigmas, policy, (side, side, cfg.in_channels)),
        steps.make_update(how, drawing, sigmas, policy, reference, optimizer, schedule_))


def make_step(
    config, parts: Functions, judge: Mapping[str, Part] | None = None
) -> Callable[[learn.State, Tree, Batch, jax.Array], tuple[learn.State, steps.Metrics]]:
    """The whole step (state, frozen, prompts, key) -> (state, metrics) for a reward that can be
    traced. Metrics are float32 scalars, means over the updates of a rollout.

    `judge` has the parts of a judge (`train.stage.open_judge`), whose parameters `frozen` has as
    "judge", by part.
    """
    weights = dict(config.rl.reward)
    of_judge = weights.pop(JUDGE, None)

    def reward(frozen, batch, latents):
        pictures = parts.decode(frozen, latents)
        found = REWARDS["edit" if "reference" in batch["positive"] else "generate"]
        score = traceable.weighted([(weight, found[name]) for name, weight in weights.items()])
        value = score(pictures, batch["goal"]) if weights else 0.0
        if of_judge is not None:
            value += of_judge * objectives.judge(
                judge["mllm"], judge["judge"], *(frozen["judge"][n] for n in ("mllm", "judge")),
                batch["judge"], batch["source"].astype(jnp.float32) / 255, pictures,
                dtype=jnp.dtype(config.dtype))
        return value, jnp.isfinite(value)

    inner = steps.make_step(parts.rollout, reward, parts.update)

    def step(state, frozen, prompts, key):
        state, report = inner(state, frozen, parts.prepare(frozen, prompts), key)
        return state, scalars(report)

    return step


def scalars(report: steps.Metrics) -> steps.Metrics:
    """The metrics of a rollout's updates as their means."""
    return {name: jnp.mean(a) if a.ndim else a for name, a in report.items()}


def copies(config, mesh: jax.sharding.Mesh) -> int:
    """How many times a prompt stands in the rows that are encoded: once, or as often as gives each
    device one where there are more devices than prompts."""
    count, parts = config.batch // config.rl.group, mesh.shape["data"] * mesh.shape["fsdp"]
    return max(1, parts // count) if parts % count == 0 else 1


def picture_side(config) -> int:
    """Of the pictures of a rollout, which are square, in pixels."""
    return round(config.data.pixels**0.5)


def frozen_reference(config, trained: Tree, frozen: Tree) -> Tree:
    """What is frozen with the reference that `make_step` needs: a copy of what trains, where that
    is not adapters."""
    if config.lora.rank or not learning(config).needs_reference:
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
