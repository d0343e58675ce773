"""A small run of reinforcement for processes of their own, by a reward that pictures of random
weights differ in: `unipic reinforce --config tests/rl/bright.py --config.model=DIR`."""

import sys
from pathlib import Path

from unipic_jax.rl import recipe

sys.path.append(str(Path(__file__).parent))
from short_runs import make_config


def get_config():
    for rewards in recipe.REWARDS.values():
        rewards["graded"] = lambda pictures, goal: pictures.mean((1, 2, 3))
    return make_config("", "edit", **{"rl.grpo.kl": 0.04, "lora.rank": 4})
