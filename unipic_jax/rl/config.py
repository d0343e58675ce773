"""The fields of a config of reinforcement learning: those of training, and a part `rl`."""

import dataclasses

from ml_collections import ConfigDict

from unipic_jax.rl import learn, objective, rollout
from unipic_jax.train import config as configs


def defaults() -> ConfigDict:
    """UniPic 2.0's settings, and Flow-GRPO's where it is silent."""
    config = configs.defaults()
    config.trained = ("transformer",)
    config.lora.update({"rank": 32, "alpha": 64.0})
    config.batch = 256  # samples a rollout, of all groups
    config.steps = 500  # rollouts
    config.ema = 0.9
    config.optimizer.update({"learning_rate": 3e-4, "warmup": 0.0, "cosine": False, "b2": 0.999,
                             "weight_decay": 1e-4})
    config.rl = {
        "task": "edit",  # or "generate", or "both", in turn
        "group": 16,  # samples of a prompt
        "prompts": "",  # a file of JSON lines (`rl.prompts`); else those of the blocks world
        # Weights of rewards: of `rl.recipe.REWARDS` or, where there is a server, of its scores.
        "reward": {"graded": 1.0},
        # Of a scoring server; or with `model` of a service that has this vision model to judge.
        "server": {"url": "", "model": "", "timeout": 60.0, "retries": 3, "batch": 16,
                   "requests": 8},
        # Edits that a stage for captions is to go on making as it did (`learn.keep`): how many an
        # update, and their file, as `prompts`.
        "kept": {"batch": 64, "prompts": ""},
        "chunks": 4,  # parts of a rollout that are sampled while the server scores those before
        "sampling": dataclasses.asdict(rollout.Config()),
        "objective": "grpo",  # or "nft"
        "grpo": dataclasses.asdict(objective.Grpo()),
        "nft": dataclasses.asdict(objective.Nft()),
        "learn": {f.name: f.default for f in dataclasses.fields(learn.Config)
                  if f.name not in ("objective", "ema", "micro_batches")},
    }
    return config


def nano(task: str) -> ConfigDict:
    """The defaults for the nano family on the blocks world, for a task."""
    config, small = defaults(), configs.nano(generate=1.0, edit=1.0)
    for name in ("data", "dtype", "save_dtype", "remat", "mesh"):
        config[name] = small[name]
    config.model = "nano"
    config.rl.task = task
    config.lora.rank = 0  # so few weights train whole
    config.steps, config.log_every = 100 if task == "generate" else 110, 1
    config.ema = 0.0  # of so few updates
    # Sixteen samples each: as fast as larger ones, and the last are left out.
    config.micro_batches, config.rl.learn.skip_equal = 16, True
    config.checkpoint.every = 20
    # What these were measured against is in docs/reproduction.md.
    config.optimizer.update({"learning_rate": 1e-4, "warmup": 0.05, "cosine": True})
    config.rl.objective, config.rl.group = "nft", 8
    config.rl.nft.kl = 0.0
    config.rl.sampling.update({"steps": 5, "noise": 0.0, "window": 1})
    if task == "edit":
        config.rl.group = 4
        config.rl.sampling.span, config.rl.learn.passes = (1, 4), 2
    config.rl.learn.keep = 2.0 if task == "generate" else 0.0
    # Scored as the policy samples.
    config.samples.update(dict(small.samples) | {"every": 50, "at_start": True, "steps": 5,
                                                 "guidance_scale": 1.0})
    return config
