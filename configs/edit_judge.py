"""The judge of edits: Qwen2.5-VL learns by regression what people or a larger model say of edits.

    unipic train --config configs/edit_judge.py --workdir DIR \
        --config.data.sources.scored.path=SCORED --config.samples.judged=HELD_OUT

333K edits of a Kontext model of one's own, scored by GPT-4.1 (section 3.3 of the report, which
leaves out all else). SCORED and HELD_OUT are folders that `unipic import` has written: of each
edit the source, the instruction as text, the result as target, and its score as the answer.
"""

from unipic_jax.train.config import defaults


def get_config():
    config = defaults()
    config.objective = "judgement"
    config.mllm = "hf://Qwen/Qwen2.5-VL-7B-Instruct"
    config.judge = "configs/edit_judge"
    config.trained, config.fresh = ("mllm", "judge"), ("judge",)
    config.data.sources.scored = {"kind": "shards", "path": "data/scored_edits", "weight": 1.0}
    config.data.ratios = ((1, 1),)
    config.batch, config.steps = 128, 2600  # once through all of them
    config.optimizer.learning_rate = 1e-5
    return config
