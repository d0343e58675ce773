"""The nano family's language model, from nothing, on questions about pictures.

    unipic train --config configs/nano/language.py --workdir DIR
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano(describe=1.0)
    config.objective = "answer"
    config.mllm = "configs/nano/model/metaquery/qwen2_5_vl"
    config.trained = config.fresh = ("mllm",)
    config.data.text_tokens = 96  # four or five questions and their answers
    config.blank_answers = 0.5  # for MetaQuery, whose queries read a prompt at once
    config.batch, config.steps = 16, 10500
    return config
