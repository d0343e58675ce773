"""The programs of a stage, with their arguments as shapes on a mesh: no weights, no data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks
from unipic_jax.data.records import Example
from unipic_jax.rl import cost as rl_cost
from unipic_jax.rl import learn, loop, recipe
from unipic_jax.train import cost, flops, optimizer, stage, state
from unipic_jax.train.draw import make_draw
from unipic_jax.train.step import make_step

KINDS = ("train", "reinforce", "sample")


class Program(NamedTuple):
    """A program before it is traced."""

    function: Callable
    arguments: tuple[Any, ...]  # trees of shapes and shardings
    donated: tuple[int, ...]  # of them, by position
    samples: int  # that one run makes or learns from
    flops: float  # a sample, of the algorithm: nothing computed again
    parameters: int  # of all parts
    trained: int  # of what trains


def make(config, kind: str, task: str, mesh: jax.sharding.Mesh) -> Program:
    """The program of a stage that trains it, reinforces it, or samples from it as it does now and
    then, for batches of a task with square pictures and texts of the greatest length.

    Raises InputError where the stage has no such program.
    """
    here = stage.open_stage(config)
    if task not in here.collate:
        raise InputError(f"--task {task}: this stage knows {', '.join(here.collate)}")
    if config.batch % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise InputError(f"a batch of {config.batch} does not divide over "
                         f"{mesh.shape['data'] * mesh.shape['fsdp']} devices; give --batch")
    trained, frozen = stage.abstract(config, here, mesh)
    counts = dict(parameters=sum(params.count(p.specs) for p in here.parts.values()
                                 if p.has_weights),
                  trained=sum(a.size for a in jax.tree.leaves(trained)))
    make_one = {"train": _train, "reinforce": _reinforce, "sample": _sample}[kind]
    return make_one(config, here, task, mesh, trained, frozen)._replace(**counts)


def _train(config, here, task, mesh, trained, frozen):
    batch = _spread(here.collate[task]([_example(config, task)]), config.batch, mesh)
    timing = optimizer.Config(**config.optimizer)
    update = optimizer.make(timing, config.steps)
    step = make_step(here.loss, update, optimizer.schedule(timing, config.steps),
                     micro_batches=config.micro_batches, ema=config.ema)
    begin = functools.partial(state.new, optimizer=update, ema=bool(config.ema))
    return Program(step, (jax.eval_shape(begin, trained), frozen, batch, _key()), (0,),
                   config.batch, cost.per_sample(config, here, batch), 0, 0)


def _reinforce(config, here, task, mesh, trained, frozen):
    if config.rl.task not in (task, "both"):
        raise InputError(f"--task {task}: this stage reinforces {config.rl.task}")
    recipe.check(config, here, mesh)
    count = config.batch // config.rl.group * recipe.copies(config, mesh)
    example = _example(config, task)
    prompts = here.collate[task]([example])
    prompts["negative"] = prompts["prompt"]
    prompts.pop("target")
    judge = None
    if recipe.JUDGE in config.rl.reward and not config.rl.server.url:
        judge = stage.open_judge(*[load.find(config.judge)] * 2)
        prompts["judge"] = loop.ask(config, judge["mllm"], [example])
        frozen["judge"] = {n: params.abstract(p.specs, jnp.dtype(config.dtype), mesh)
                           for n, p in judge.items()}
    if not config.rl.server.url and set(config.rl.reward) - {recipe.JUDGE}:
        goal = blocks.sample(task, 0, 0).goal
        prompts["goal"] = jax.tree.map(lambda a: np.asarray(a)[None], goal)
    prompts = _spread(prompts, count, mesh)
    if config.rl.learn.keep:
        kept = here.collate["edit"]([_example(config, "edit")])
        kept["negative"] = kept["prompt"]
        kept.pop("target")
        prompts["kept"] = _spread(kept, config.rl.kept.batch, mesh)
    each = rl_cost.per_sample(config, here, prompts, judge)
    how = recipe.learning(config)
    if not config.lora.rank and how.needs_reference:
        frozen["reference"] = params.abstract(
            here.parts["transformer"].specs, jnp.dtype(config.dtype), mesh)
    timing = optimizer.Config(**config.optimizer)
    update = optimizer.make(timing, config.steps * how.rounds)
    parts = recipe.functions(config, here, update, optimizer.schedule(timing, config.steps))
    step = recipe.make_step(config, parts, judge)
    if config.rl.server.url:
        scores = jax.ShapeDtypeStruct((config.batch,), jnp.float32,
                                      sharding=meshes.batch_sharding(mesh, 1))
        step, prompts = _served(parts), (prompts, scores)
    begin = functools.partial(learn.new, how, optimizer=update)
    return Program(step, (jax.eval_shape(begin, trained), frozen, prompts, _key()), (0,),
                   config.batch, each, 0, 0)


def _served(parts):
    """A step whose reward comes from a server: both of its programs as one, with the pictures
    that the server gets, and with its scores in hand before it has them."""
    def step(state, frozen, given, key):
        prompts, scores = given
        batch = parts.prepare(frozen, prompts)
        trajectory = parts.rollout(state, frozen, batch, key)
        pictures = parts.decode(frozen, trajectory.latents)
        state, report = parts.update(state, frozen, batch, trajectory, scores,
                                     jnp.isfinite(scores), key)
        return state, report, pictures

    return step


def _sample(config, here, task, mesh, trained, frozen):
    if config.objective != "velocity":
        raise InputError(f"a stage of objective {config.objective!r} draws nothing to sample")
    batch = _spread(here.collate[task]([_example(config, task)]), config.batch, mesh)
    guided = config.samples.guidance_scale > 1
    draw = make_draw(here.parts, steps=config.samples.steps,
                     guidance_scale=config.samples.guidance_scale, dtype=jnp.dtype(config.dtype))

    def sample(trained, frozen, batch, negative, keys):
        return draw(here.combine(trained, frozen), batch, negative, keys)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.batch))
    keys = keys.update(sharding=meshes.batch_sharding(mesh, 1))
    forward = cost.forward(config.objective, here.parts, batch)
    vae, side = here.parts["vae"].config, batch["target"].shape[1]
    edits = 1 if "source" in batch else 0
    each = (forward.pop("transformer") * config.samples.steps * (1 + guided)
            + forward.pop("vae") * edits / (1 + edits) + flops.decode(vae, side, side)
            + sum(forward.values()) * (1 + guided))
    return Program(sample, (trained, frozen, batch, batch["prompt"] if guided else None, keys), (),
                   config.batch, each, 0, 0)


def _example(config, task):
    """With square pictures, and more text than any encoder takes."""
    side = recipe.picture_side(config)
    blank = np.zeros((side, side, 3), np.uint8)
    text = "word " * (2 * config.data.text_tokens)
    judged = config.objective == "judgement"
    return Example("", text, target=blank if task != "describe" or judged else None,
                   source=blank if task != "generate" else None,
                   answer="0" if task == "describe" else "")


def _spread(batch, rows, mesh):
    """A batch of one row as the shapes of one of many."""
    def one(a):
        return jax.ShapeDtypeStruct(
            (rows, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype),
            sharding=meshes.batch_sharding(mesh, a.ndim))

    return jax.tree.map(one, batch)


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))
