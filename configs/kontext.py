"""Stage B: SD3.5-Medium becomes Kontext, which edits as well as it draws.

    unipic train --config configs/kontext.py --workdir DIR \
        --config.data.sources.edits.path=EDITS --config.data.sources.captions.path=CAPTIONS

5M edits and 6M captioned pictures, 200K steps of 128, AdamW at 4e-5 (section 3.1 of the report).
EDITS and CAPTIONS are folders that `unipic import` has written.
"""

from unipic_jax.train.config import defaults


def get_config():
    config = defaults()
    config.model = "hf://stabilityai/stable-diffusion-3.5-medium"
    config.trained = ("transformer",)
    # The report says that batches alternate, not how often; one edit to three captions is what a
    # later model of the same family trains with.
    config.data.sources.edits = {"kind": "shards", "path": "data/edits", "weight": 1.0}
    config.data.sources.captions = {"kind": "shards", "path": "data/captions", "weight": 3.0}
    return config
