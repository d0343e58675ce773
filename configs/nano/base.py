"""The nano family's text-to-image model, transformer and text encoders from nothing.

    unipic train --config configs/nano/base.py --workdir DIR --config.model=AUTOENCODER/model
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0)
    config.trained = config.fresh = ("transformer", "text_encoder", "text_encoder_2",
                                     "text_encoder_3")
    config.batch, config.steps = 32, 2000
    return config
