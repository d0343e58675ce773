"""The step with a reward on the host: rollout and update are jitted apart, and the samples of one
part of a rollout are scored while the next part is sampled."""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.rl import learn, recipe, rollout
from unipic_jax.rl.prompts import Prompts
from unipic_jax.rl.rewards import host
from unipic_jax.rl.rewards.host import HostReward
from unipic_jax.rl.rewards.http_client import Connection, Remote
from unipic_jax.rl.rewards.judge import Judge
from unipic_jax.train.step import split

TOKEN = "UNIPIC_REWARD_TOKEN"  # the environment's variable with the server's password


def connect(config) -> HostReward:
    """The reward of the config's server; InputError where it is down, or has no such scores."""
    where = config.rl.server
    connection = Connection(where.url, where.timeout, where.retries,
                            token=os.environ.get(TOKEN, ""))
    scorer = Judge(connection, where.model) if where.model else Remote(connection)
    reward = HostReward(scorer, batch_size=where.batch, concurrency=where.requests)
    try:
        host.total(dict.fromkeys(reward.names, np.zeros(1)), config.rl.reward)
    except InputError:
        reward.close()
        raise
    return reward


def make_step(config, parts: recipe.Functions, prompts: Prompts, reward: HostReward) -> Callable:
    """The step of `recipe.make_step` with the scores of a host reward; not to be jitted.

    Where no sample has a score nothing is learned, and the step counts as skipped.
    """
    rounds = recipe.learning(config).rounds
    chunks, devices = config.rl.chunks, prompts.mesh.shape["data"] * prompts.mesh.shape["fsdp"]
    if chunks < 1 or config.batch % (chunks * devices):
        raise InputError(f"a batch of {config.batch} does not divide into {chunks} chunks over "
                         f"{devices} devices")

    @jax.jit
    def prepare(frozen, arrays):
        batch = parts.prepare(frozen, arrays)
        kept = {"kept": batch.pop("kept")} if "kept" in batch else {}
        split_up = jax.tree.map(lambda a: split(a, chunks), batch)
        return [jax.tree.map(lambda a, i=i: a[i], split_up) for i in range(chunks)], kept

    @jax.jit
    def draw(state, frozen, chunk, key):
        trajectory = parts.rollout(state, frozen, chunk, key)
        pictures = jnp.round(parts.decode(frozen, trajectory.latents) * 255)
        return trajectory, pictures.astype(jnp.uint8)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, frozen, sampled, kept, trajectories, values, valid, key):
        batch = jax.tree.map(lambda *a: jnp.concatenate(a), *sampled) | kept
        trajectory = rollout.concatenate(trajectories)
        state, report = parts.update(state, frozen, batch, trajectory, values, valid, key)
        return state, recipe.scalars(report)

    def step(state: learn.State, frozen, arrays, key):
        drawn = prompts.of(config.seed, int(state.step) // rounds)
        sampled, kept = prepare(frozen, arrays)
        trajectories, waiting = [], []
        for chunk in sampled:
            trajectory, pictures = draw(state, frozen, chunk, key)
            trajectories.append(trajectory)
            # The next chunk is on its way already when these pictures are waited for.
            waiting.append((meshes.on_host(chunk["id"]), pictures))
        futures = [_submit(reward, drawn, config.rl.group, *one) for one in waiting]
        found = [_whole(future.result(), mine, config.rl.reward) for mine, future in futures]
        values, valid = (np.concatenate(a) for a in zip(*found))
        return update(state, frozen, sampled, kept, trajectories, values, valid, key)

    return step


def _submit(reward, drawn, group, ids, pictures):
    """Ask for this process's part of the scores: which rows they are, and their future."""
    pictures = meshes.on_host(pictures)
    mine = np.arange(len(ids)) % jax.process_count() == jax.process_index()
    of = [drawn[i // group] for i in ids[mine]]
    sources = None if of[0].example.source is None else [p.example.source for p in of]
    return mine, reward.submit(pictures[mine], [p.example.text for p in of],
                               [p.metadata for p in of], sources, ids[mine].tolist())


def _whole(scores, mine, weights) -> tuple[np.ndarray, np.ndarray]:
    """The scores of all processes: values float32 [n] and which are valid, bool [n]."""
    found = np.zeros((2, len(mine)), np.float32)
    found[:, mine] = host.total(scores.values, weights), scores.valid
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.process_allgather(found)).sum(0)
    return found[0], found[1] > 0
