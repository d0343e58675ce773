"""Stage B on nano: the text-to-image model becomes Kontext.

    unipic train --config configs/nano/kontext.py --workdir DIR --config.model=BASE/model
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0, edit=1.0)
    config.trained = ("transformer",)
    config.batch, config.steps = 32, 6400
    config.optimizer.learning_rate = 1e-3
    return config
