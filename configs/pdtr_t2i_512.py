"""PDTR, second stage: the model of the first one is reinforced on captions, by GenEval's rules.

    unipic reward-server --reward geneval --detector http://HOST:PORT --port 8000
    unipic reinforce --config configs/pdtr_t2i_512.py --workdir DIR --config.model=EDIT/model \
        --config.rl.prompts=CAPTIONS.jsonl --config.rl.server.url=http://localhost:8000

CAPTIONS.jsonl has a caption as "prompt" and GenEval's metadata on each line. All else is as in the
first stage, as the report has it.
"""

from unipic_jax.rl.config import defaults


def get_config():
    config = defaults()
    config.rl.task = "generate"
    config.rl.server.url = "http://localhost:8000"
    config.rl.reward = {"graded": 1.0}
    return config
