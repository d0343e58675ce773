"""A whole run of reinforcement learning: from a config and a folder to a model in it.

The folder holds what that of `train.loop` does, and a run goes on in the same way.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unipic_jax.conditioning import judging, qwen_chat
from unipic_jax.convert import load
from unipic_jax.core import curves
from unipic_jax.data.records import Example
from unipic_jax.model import Part
from unipic_jax.rl import learn, recipe, remote
from unipic_jax.rl.alarms import Alarms
from unipic_jax.rl.prompts import Blocks, File, Prompts
from unipic_jax.train import loop, optimizer, output, stage
from unipic_jax.train.checkpoint import alone

log = logging.getLogger(__name__)


def reinforce(config: ConfigDict, workdir: Path, *, progress: bool = True) -> bool:
    """Run the stage to its end, or until SIGTERM; whether it came to the end.

    Raises InputError for a config that does not fit, weights that cannot be read, a full disk, a
    reward server that is down at the start, where another run is in the folder, or where too many
    steps in a row were not finite or had no reward.
    """
    if (workdir / "model").exists():
        log.info("%s holds the model already", workdir)
        return True
    mesh = loop.open_mesh(config)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        here = stage.open_stage(config)
        recipe.check(config, here, mesh)
        judge, asked = None, None
        if recipe.JUDGE in config.rl.reward and not config.rl.server.url:
            judge = stage.open_judge(*[load.find(config.judge)] * 2)
            asked = functools.partial(ask, config, judge["mllm"])
        prompts = open_prompts(config, here, mesh, asked)
        reward = stack.enter_context(remote.connect(config)) if config.rl.server.url else None
        how = recipe.learning(config)
        trained, frozen = stage.parameters(config, here, mesh)
        frozen = recipe.frozen_reference(config, trained, frozen)
        if judge:
            dtype = jnp.dtype(config.dtype)
            frozen["judge"] = {n: load.read(part, dtype, mesh) for n, part in judge.items()}
        total = config.steps * how.rounds
        timing = optimizer.Config(**config.optimizer)
        update = optimizer.make(timing, total)
        now = jax.jit(functools.partial(learn.new, how, optimizer=update))(trained)
        del trained
        parts = recipe.functions(config, here, update, optimizer.schedule(timing, total))
        if reward:
            advance = remote.make_step(config, parts, prompts, reward)
        else:
            advance = jax.jit(recipe.make_step(config, parts, judge), donate_argnums=0)
        data = loop.Data(config, here, frozen, mesh)
        stack.enter_context(alone(workdir))
        end = loop.run(config, here, now, frozen, advance, prompts, data, workdir, mesh,
                       progress=progress, versions=lambda: {reward.name: reward.version}
                       if reward else {}, useless=USELESS,
                       watch=Alarms(workdir / "metrics.jsonl"))
        if end is not None:
            if jax.process_index() == 0:
                _draw_reward(workdir)
            output.write(config, here, loop.weights(end), frozen, workdir / "model")
    return end is not None


def _draw_reward(workdir: Path) -> None:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rewards = [r for line in lines if (r := json.loads(line).get("reward")) is not None]
    if rewards:
        curves.curve(rewards, "reward, mean of each rollout").save(workdir / "reward.png")


USELESS = ("were not finite or had no reward; lower the learning rate, or see to the reward "
           "server: the same command goes on from the last checkpoint")


def open_prompts(config, here, mesh, ask) -> Prompts:
    """The prompts of a stage, of blocks or of the config's file."""
    side, tasks = recipe.picture_side(config), recipe.TASKS[config.rl.task]
    sources = {task: File(Path(config.rl.prompts), task, side) if config.rl.prompts
               else Blocks(task) for task in tasks}
    kept = None
    if config.rl.learn.keep:
        file = config.rl.kept.prompts
        kept = File(Path(file), "edit", side) if file else Blocks("edit")
    return Prompts(sources, here.collate, config.batch // config.rl.group, mesh, ask,
                   recipe.copies(config, mesh), kept, config.rl.kept.batch)


def ask(config, mllm: Part, examples: Sequence[Example]) -> dict:
    """What the judge is asked of edits, as the arrays of `judging.Inputs` by name."""
    side = recipe.picture_side(config)
    return judging.prepare(qwen_chat.open_chat(mllm.folder), mllm.config,
                           [e.text for e in examples], (side, side),
                           config.data.text_tokens)._asdict()
