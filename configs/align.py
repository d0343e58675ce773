"""Stage A: the queries and the connector learn to speak for Qwen2.5-VL to SD3.5-Medium.

    unipic train --config configs/align.py --workdir DIR --config.conditioner=FOLDER \
        --config.data.sources.captions.path=CAPTIONS

150M captioned pictures, 500K steps of 1024, AdamW at 1e-4 (section 3.1 of the report). FOLDER has
the conditioner's config.json; its weights begin from nothing. CAPTIONS is a folder that
`unipic import` has written.
"""

from unipic_jax.train.config import defaults


def get_config():
    config = defaults()
    config.model = "hf://stabilityai/stable-diffusion-3.5-medium"
    config.mllm = "hf://Qwen/Qwen2.5-VL-7B-Instruct"
    config.trained = config.fresh = ("conditioner",)
    config.data.sources.captions = {"kind": "shards", "path": "data/captions", "weight": 1.0}
    config.batch, config.steps = 1024, 500_000
    config.optimizer.learning_rate = 1e-4
    return config
