"""Stage C: the connector of stage A and the transformer of stage B become one model, MetaQuery.

    unipic train --config configs/unified.py --workdir DIR \
        --config.model=KONTEXT/model --config.conditioner=ALIGN/model/conditioner \
        --config.data.sources.edits.path=EDITS --config.data.sources.captions.path=CAPTIONS

The data and the settings of stage B; queries, connector and transformer train (section 3.1 of the
report). Prompts are as the released inference has them, so that what comes out runs like the
release: `--config.three_axis_rope=True --config.newline_after_picture=True` are what Qwen2.5-VL
was trained with, and go with the same options of `unipic edit`.
"""

from unipic_jax.train.config import defaults


def get_config():
    config = defaults()
    config.mllm = "hf://Qwen/Qwen2.5-VL-7B-Instruct"
    config.trained = ("conditioner", "transformer")
    config.data.sources.edits = {"kind": "shards", "path": "data/edits", "weight": 1.0}
    config.data.sources.captions = {"kind": "shards", "path": "data/captions", "weight": 3.0}
    return config
