"""PDTR, first stage: Kontext is reinforced on edits, by the scores of a judge.

    unipic reinforce --config configs/pdtr_edit_512.py --workdir DIR \
        --config.rl.prompts=EDITS.jsonl --config.judge=JUDGE/model

EDITS.jsonl has {"prompt": instruction, "image": path} on each line; JUDGE is what
configs/edit_judge.py has made. For a service that judges in its place (the report's other choice,
GPT-4.1), with its key in UNIPIC_REWARD_TOKEN:

        --config.rl.server.url=https://HOST/v1 --config.rl.server.model=NAME \
        --config.rl.server.batch=1 --config.rl.reward="{'overall': 1.0}"

10 steps, noise 0.7, groups of 16, batches of 256, adapters of rank 32, a rate of 3e-4 and a
divergence weighed by 0.04 (section 3.3 of the report), all of them `rl.config`'s defaults. The
report leaves out how long, and with which guidance; there is none here, as in Flow-GRPO's.
"""

from unipic_jax.rl.config import defaults


def get_config():
    config = defaults()
    config.model = "hf://Skywork/UniPic2-SD3.5M-Kontext-2B"
    config.rl.task = "edit"
    config.rl.reward = {"judge": 1.0}
    return config
