"""How much of a policy gradient is signal: the cosine between those of independent rollouts.

    python -m benchmarks.coherence --model KONTEXT --task edit --objective grpo [--rollouts 4]

The gradient is taken at each step of sampling by itself, for rollouts of the nano configs' batch
with prompts of their own. "normed" adds up the steps after each gradient is scaled to length 1.
A cosine of c means that so many rollouts as 1 / c are needed for a mean gradient whose signal is as
large as its noise. DiffusionNFT samples without noise; its gradient is that at equal policies.
"""

import argparse
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from unipic_jax.flow import schedule, transition
from unipic_jax.models import mmdit
from unipic_jax.rl import advantage, learn, loop, objective, recipe
from unipic_jax.rl import config as configs
from unipic_jax.train import loop as loops
from unipic_jax.train import optimizer, stage

PART = 64  # samples whose gradient is taken at a time


class Rollouts(NamedTuple):
    """Gradients float32 [R, D] by step, and the levels of the steps."""

    gradients: dict[int, np.ndarray]
    sigmas: np.ndarray


def gradients(config, count: int) -> Rollouts:
    """Those of `count` rollouts from the config's model."""
    nft, task = config.rl.objective == "nft", config.rl.task
    mesh = loops.open_mesh(config)
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        trained, frozen = stage.parameters(config, here, mesh)
        update = optimizer.make(optimizer.Config(**config.optimizer), count)
        state = learn.new(recipe.learning(config), trained, update)
        parts = recipe.functions(config, here, update, lambda step: 0.0)
        drawing, timing = recipe.sampling(config), here.parts["scheduler"].config
        sigmas = schedule.sigmas(timing, drawing.steps)
        steps = transition.make(drawing.kind, sigmas, drawing.noise)

        def velocity(trained, condition, x, sigma):
            time = jnp.broadcast_to(sigma * timing.num_train_timesteps, x.shape[:1])
            return mmdit.apply(here.parts["transformer"].config,
                               here.combine(trained, frozen)["transformer"], x, time, **condition)

        @jax.jit
        def draw(state, frozen, prompts, key):
            batch = parts.prepare(frozen, prompts)
            path = parts.rollout(state, frozen, batch, key)
            reward = recipe.REWARDS[task]["graded"](parts.decode(frozen, path.latents),
                                                    batch["goal"])
            found, _ = advantage.advantages(reward, batch["group"], jnp.isfinite(reward))
            return batch["positive"], path, found

        @jax.jit
        def slope(trained, condition, path, advantage, index, key):
            step = jax.tree.map(lambda a: jnp.asarray(a)[index], steps)
            # The last step has no noise, and Flow-GRPO none of it to learn from.
            x, following = (path.x[:, jnp.minimum(index + i, drawing.size)] for i in (0, 1))
            rows = {"condition": condition, "advantage": advantage, "x": x,
                    "following": following, "x0": path.latents,
                    "noise": jax.random.normal(key, path.latents.shape)}

            def loss(trained, row):
                if not nft:
                    v = velocity(trained, row["condition"], row["x"], step.sigma)
                    return -(row["advantage"] * transition.log_prob(
                        step, row["x"], v, row["following"])).sum()
                x = (1 - step.sigma) * row["x0"] + step.sigma * row["noise"]
                v = velocity(trained, row["condition"], x, step.sigma)
                still = lax.stop_gradient(v)
                level = jnp.broadcast_to(step.sigma, v.shape[:1])
                return objective.nft(objective.Nft(), row["advantage"], row["x0"], x, level, v,
                                     still, None)[0].sum()

            def part(total, row):
                return jax.tree.map(jnp.add, total, jax.grad(loss)(trained, row)), None

            cut = jax.tree.map(lambda a: a.reshape(-1, PART, *a.shape[1:]), rows)
            return lax.scan(part, jax.tree.map(jnp.zeros_like, trained), cut)[0]

        prompts = loop.open_prompts(config, here, mesh, None)(config.seed)
        found = {i: [] for i in range(drawing.steps - (not nft))}
        for number in tqdm(range(count), unit="rollout"):
            key = jax.random.key(number)
            condition, path, worth = draw(state, frozen, next(prompts)[1], key)
            for index, rows in found.items():
                leaves = jax.tree.leaves(slope(state.params, condition, path, worth, index,
                                               jax.random.fold_in(key, index)))
                rows.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    return Rollouts({i: np.stack(rows) for i, rows in found.items()}, sigmas)


def cosines(rows: np.ndarray) -> np.ndarray:
    """Between each two of several vectors [R, D]."""
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.array([a @ b for a, b in itertools.combinations(rows, 2)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=("edit", "generate"), default="edit")
    parser.add_argument("--objective", choices=recipe.OBJECTIVES, default="grpo")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=4)
    args = parser.parse_args()
    config = configs.nano(args.task)
    config.model, config.rl.objective, config.rl.group = args.model, args.objective, args.group
    if args.objective == "nft":
        config.rl.sampling.noise = 0.0
    found, sigmas = gradients(config, args.rollouts)
    sizes = {i: np.linalg.norm(rows, axis=-1) for i, rows in found.items()}
    normed = {i: rows / sizes[i][:, None] for i, rows in found.items()}
    lines = {f"step {i}, level {sigmas[i]:.3f}": rows for i, rows in found.items()}
    lines |= {"all": sum(found.values()), "all, normed": sum(normed.values()),
              "first four, normed": sum(normed[i] for i in range(4))}
    for name, rows in lines.items():
        size, all_ = np.linalg.norm(rows, axis=-1).mean(), cosines(rows)
        error = all_.std() / max(1, len(rows)) ** 0.5
        print(f"{name:24} norm {size:10.3g}   cosine {all_.mean():7.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
