"""Where the time of a step of reinforcement goes, and what a picture costs by recipe.

    python -m benchmarks.rl_step [--turns 5] [--json F]

The shipped nano model on edits of blocks, 256 samples a rollout in groups of 4, all weights, on all
cores: the parts of the step, each a program of its own, and the step as one program; medians over
the turns, after one that is not counted. "full" is Flow-GRPO in ten steps, nine of which train,
with divergence from the reference; "window" trains two of them, without; "nft" is the recipe of
configs/nano/rl_edit.py but that nothing is skipped, and "skip" that recipe itself. The update
alone learns from drawn rewards, of which 59 % of the groups have equal ones, about as in the runs
of docs/reproduction.md; the whole step from the model's own, whose share of such groups is printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.data import feed
from unipic_jax.rl import learn, loop, recipe
from unipic_jax.rl.config import nano
from unipic_jax.train import loop as train_loop
from unipic_jax.train import optimizer, stage

GRPO = {"rl.objective": "grpo", "rl.learn.passes": 1, "rl.sampling.steps": 10,
        "rl.sampling.noise": 0.7, "rl.sampling.span": (0, 0), "rl.learn.skip_equal": False}
RECIPES = {
    "full": GRPO | {"rl.sampling.window": 9, "rl.grpo.kl": 0.04},
    "window": GRPO | {"rl.sampling.window": 2, "rl.grpo.kl": 0.0},
    "nft": {"rl.learn.skip_equal": False},
    "skip": {}}
EQUAL = 0.59  # of the groups
PARTS = ("encode", "rollout", "decode", "reward", "update", "whole")


def programs(name: str) -> tuple[int, dict]:
    """How many samples a rollout of a recipe has, and its parts as functions of no argument."""
    config = nano("edit")
    config.update_from_flattened_dict(RECIPES[name])
    mesh = train_loop.open_mesh(config)
    jax.set_mesh(mesh)
    here = stage.open_stage(config)
    how = recipe.learning(config)
    trained, frozen = stage.parameters(config, here, mesh)
    frozen = recipe.frozen_reference(config, trained, frozen)
    timing = optimizer.Config(**config.optimizer)
    update = optimizer.make(timing, config.steps * how.rounds)
    parts = recipe.functions(config, here, update, optimizer.schedule(timing, config.steps))
    state, key = jax.jit(lambda t: learn.new(how, t, update))(trained), jax.random.key(0)
    _, prompts = next(feed.prefetch(mesh, loop.open_prompts(config, here, mesh, None)(0)))

    prepare, sample, decode, score, improve, whole = map(jax.jit, (
        parts.prepare, parts.rollout, parts.decode, recipe.REWARDS["edit"]["graded"],
        parts.update, recipe.make_step(config, parts)))
    batch = prepare(frozen, prompts)
    drawn = sample(state, frozen, batch, key)
    pictures = decode(frozen, drawn.latents)
    reward = score(pictures, batch["goal"])
    valid = jnp.isfinite(reward)
    draw, group = np.random.default_rng(0), np.asarray(batch["group"])
    equal = draw.permutation(group[-1] + 1) < EQUAL * (group[-1] + 1)
    drawn_reward = np.where(equal[group], 1, draw.normal(size=len(group))).astype(np.float32)
    return config.batch, dict(zip(PARTS, (
        lambda: prepare(frozen, prompts), lambda: sample(state, frozen, batch, key),
        lambda: decode(frozen, drawn.latents), lambda: score(pictures, batch["goal"]),
        lambda: improve(state, frozen, batch, drawn, drawn_reward, valid, key),
        lambda: whole(state, frozen, prompts, key))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("milliseconds a picture\n" + f"{'':8}" + "".join(f"{part:>9}" for part in PARTS)
          + f"{'equal':>9}")
    found = {}
    for name in RECIPES:
        size, work = programs(name)
        seconds = {part: [] for part in PARTS}
        for _ in range(1 + args.turns):
            for part, run in work.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[part].append(time.perf_counter() - start)
        found[name] = {part: 1e3 * statistics.median(times[1:]) / size
                       for part, times in seconds.items()}
        found[name]["equal"] = float(work["whole"]()[1]["collapsed"])
        print(f"{name:8}" + "".join(f"{figure:9.2f}" for figure in found[name].values()),
              flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
