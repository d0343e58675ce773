"""Stage A on nano: queries and connector from nothing, language model and transformer frozen.

    unipic train --config configs/nano/align.py --workdir DIR \
        --config.model=BASE/model --config.mllm=LANGUAGE/model
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(generate=1.0)
    config.conditioner = "configs/nano/model/metaquery/conditioner"
    config.trained = config.fresh = ("conditioner",)
    config.batch, config.steps = 32, 1500
    return config
