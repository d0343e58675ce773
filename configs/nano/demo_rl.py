"""A few minutes of reinforcement on nano: the shipped model learns to draw captions in five steps.

    unipic reinforce --config configs/nano/demo_rl.py --workdir DIR
"""

from unipic_jax.rl.config import nano


def get_config():
    config = nano("generate")
    config.batch, config.steps = 128, 30
    config.micro_batches, config.rl.kept.batch = 8, 32
    config.samples.every = 1000
    return config
