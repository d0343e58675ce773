"""Small runs of reinforcement learning, and what is left of them."""

import json

from flax import traverse_util

from unipic_jax.convert import load
from unipic_jax.model import read_part
from unipic_jax.rl import config as configs


def make_config(model, task, **changes):
    """Flow-GRPO, unless `changes` say otherwise."""
    config = configs.nano(task)
    config.model, config.batch, config.steps = str(model), 16, 4
    config.rl.objective, config.rl.group, config.micro_batches = "grpo", 2, 1
    config.rl.grpo.kl, config.rl.learn.keep, config.rl.learn.passes = 0.0, 0.0, 1
    config.rl.sampling.update({"steps": 3, "noise": 0.7, "window": 1, "place": "random",
                               "span": (0, 0)})
    config.mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    config.optimizer.update({"learning_rate": 1e-2, "warmup": 0.0, "cosine": False})
    config.checkpoint.update({"every": 2, "keep": 9})
    config.samples.update({"count": 0, "blocks": 0, "at_start": False})
    config.update_from_flattened_dict(changes)
    return config


def flat(folder):
    return traverse_util.flatten_dict(load.read(read_part(folder / "model/transformer")))


def figures(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]
