"""A few minutes of stage B on nano: the shipped text-to-image transformer learns to edit, with the
shipped Kontext model's text encoders, which know instructions.

    unipic train --config configs/nano/demo.py --workdir DIR --config.model=BASE
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0, edit=1.0)
    config.trained = ("transformer",)
    config.batch, config.steps = 32, 500
    config.ema = 0.99
    config.samples.update({"at_start": True, "blocks": 8})
    return config
