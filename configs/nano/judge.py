"""The judge of edits on nano, from the language model that answers questions.

    unipic scored-edits --model KONTEXT/model --count 50000 --to SCORED
    unipic scored-edits --model KONTEXT/model --count 1024 --held-out --to HELD_OUT
    unipic train --config configs/nano/judge.py --workdir DIR --config.mllm=LANGUAGE/model \
        --config.data.sources.scored.path=SCORED --config.samples.judged=HELD_OUT
"""

from unipic_jax.train.config import nano


def get_config():
    config = nano()
    config.objective = "judgement"
    config.judge = "configs/nano/model"
    config.trained, config.fresh = ("mllm", "judge"), ("judge",)
    config.data.sources.scored = {"kind": "shards", "path": "", "weight": 1.0}
    config.batch, config.steps = 32, 3000
    return config
