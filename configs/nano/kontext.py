"""Stage B on nano: the text-to-image model becomes Kontext.

    unipic train --config configs/nano/kontext.py --workdir DIR --config.model=BASE/model
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0, edit=0.75)  # captions are the harder of the two
    # The report freezes the text encoders; those of nano have read captions alone so far, and
    # have yet to learn what an instruction is.
    config.trained = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    config.batch, config.steps = 32, 4400
    config.samples.every = 2200  # scores take a minute of a core
    return config
