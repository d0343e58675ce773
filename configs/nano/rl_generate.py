"""DiffusionNFT on nano, text to image: the second stage of PDTR, from the first one's model.

    unipic reinforce --config configs/nano/rl_generate.py --workdir DIR --config.model=EDIT/model
"""

from unipic_jax.rl.config import nano


def get_config():
    return nano("generate")
