"""The nano family's autoencoder, from nothing, on the blocks world.

    unipic train --config configs/nano/autoencoder.py --workdir DIR
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0)
    config.objective = "reconstruction"
    config.model = "configs/nano/model/kontext"
    config.trained = config.fresh = ("vae",)
    config.batch, config.steps = 8, 5000
    config.ema = 0.995
    config.optimizer.learning_rate = 2e-3
    return config
