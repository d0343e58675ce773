"""A Kontext transformer from nothing, on the autoencoder and text encoders of the shipped model.

    unipic train --config configs/nano/demo.py --workdir DIR
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0, edit=1.0)
    config.model = "nano"
    config.trained = config.fresh = ("transformer",)
    config.batch, config.steps = 32, 800
    config.ema = 0.99
    config.samples.update({"at_start": True, "blocks": 8})
    return config
