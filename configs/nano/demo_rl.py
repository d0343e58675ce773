"""A few minutes of Flow-GRPO on nano: the shipped model is reinforced on edits.

    unipic reinforce --config configs/nano/demo_rl.py --workdir DIR
"""

from unipic_jax.rl.config import nano


def get_config():
    config = nano("edit")
    config.batch, config.steps = 128, 24
    config.micro_batches = 2
    config.rl.sampling.update({"window": 3, "place": "random"})  # of the 8 steps
    config.samples.update({"every": 1000, "blocks": 8})
    return config
