"""Stage C on nano: the conditioner of stage A and the transformer of stage B, together.

    unipic train --config configs/nano/unified.py --workdir DIR --config.model=KONTEXT/model \
        --config.mllm=LANGUAGE/model --config.conditioner=ALIGN/model/conditioner
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0, edit=2.0)  # the conditioner has seen captions alone so far
    config.trained = ("conditioner", "transformer")
    config.batch, config.steps = 32, 2000
    return config
