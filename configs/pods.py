"""The stages of the paper on TPU pods, at 512 and at 1024 pixels.

    unipic plan --config configs/pods.py:STAGE,PIXELS,GENERATION --topology GENERATION:SHAPE
    unipic train --config configs/pods.py:kontext,1024,v5p --workdir DIR --distributed

STAGE is the name of a file in this folder: kontext, align, unified, pdtr_edit_512 or
pdtr_t2i_512, which says what its data and its folders are; GENERATION is v5e, v5p or v6e. A pod is
256 chips of v5e (16x16) and v6e (16x16), or 64 of v5p (4x4x4); what each of these comes to is in
docs/pods.md.
"""

import runpy
from pathlib import Path

CHIPS = {"v5e": 256, "v5p": 64, "v6e": 256}
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
# What is frozen and finds room on every chip: 11 GB of text encoders, a transformer of 5 and a
# language model of 17.
WHOLE = {
    "v5e": {"align": ("transformer",), "pdtr_edit_512": ("transformer",),
            "pdtr_t2i_512": ("transformer",)},
    "v5p": {"kontext": TEXT, "align": ("mllm", "transformer"), "unified": ("mllm",),
            "pdtr_edit_512": (*TEXT, "transformer"), "pdtr_t2i_512": (*TEXT, "transformer")},
    "v6e": {"kontext": TEXT, "align": ("transformer",), "unified": ("mllm",),
            "pdtr_edit_512": ("transformer",), "pdtr_t2i_512": (*TEXT, "transformer")}}


def get_config(arguments: str = "kontext,512,v5p"):
    stage, pixels, generation = arguments.split(",")
    config = runpy.run_path(str(Path(__file__).with_name(f"{stage}.py")))["get_config"]()
    config.data.pixels = int(pixels)**2
    # A layer's weights are gathered from 16 chips: of more, each would have less than the 16 rows
    # that a chip keeps together, and XLA would sum them up in place of gathering them, at twice
    # the traffic.
    config.mesh = {"data": -1, "fsdp": 16, "tensor": 1}
    config.whole = WHOLE[generation].get(stage, ())
    # The paper's batch, or a sample a chip where that is more; rates follow its square root.
    grown = max(1, CHIPS[generation] / config.batch)
    config.batch = round(config.batch * grown)
    config.optimizer.learning_rate *= grown**0.5
    return config
