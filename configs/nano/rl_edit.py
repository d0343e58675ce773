"""DiffusionNFT on nano, editing: the first stage of PDTR.

    unipic reinforce --config configs/nano/rl_edit.py --workdir DIR --config.model=KONTEXT/model
"""

from unipic_jax.rl.config import nano


def get_config():
    return nano("edit")
