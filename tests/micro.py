"""The smallest model that every stage trains, and the config of a run with it:
`unipic train --config tests/micro.py:STAGE`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# So that XLA compiles in a third of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True,
         "xla_cpu_use_fusion_emitters": False}
ROOT = Path(__file__).parents[1]
NANO = ROOT / "configs/nano/model"
ENCODER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
           "projection_dim": 16}
CHANGES = {  # to the nano family's configs
    "kontext/transformer": {
        "attention_head_dim": 16, "caption_projection_dim": 32, "dual_attention_layers": [0],
        "in_channels": 4, "joint_attention_dim": 64, "num_layers": 2, "out_channels": 4,
        "pooled_projection_dim": 32},
    "kontext/vae": {
        "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
        "latent_channels": 4, "norm_num_groups": 4, "up_block_types": ["UpDecoderBlock2D"] * 2},
    "kontext/text_encoder": ENCODER,
    "kontext/text_encoder_2": ENCODER,
    "kontext/text_encoder_3": {"d_ff": 32, "d_kv": 16, "d_model": 64, "num_heads": 2,
                               "num_layers": 1},
    "metaquery/conditioner": {
        "connector_config": {"hidden_size": 64, "intermediate_size": 64,
                             "num_attention_heads": 2, "num_hidden_layers": 1},
        "joint_attention_dim": 64, "llm_hidden_size": 64, "num_queries": 4,
        "pooled_projection_dim": 32},
    "metaquery/qwen2_5_vl": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "rope_scaling": {"mrope_section": [2, 3, 3], "type": "mrope"},
        "vision_config": {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 32,
                          "intermediate_size": 32, "out_hidden_size": 64}},
    "judge": {"hidden_size": 64},
}


def make_model(target: Path) -> Path:
    """The parts with random weights, in the released layout, in the new folder `target`."""
    from benchmarks import random_release
    from unipic_jax.model import read_part

    shutil.copytree(NANO, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, changes in CHANGES.items():
        file = target / name / "config.json"
        raw = json.loads(file.read_text())
        inner = {k: raw[k] | v for k, v in changes.items() if isinstance(v, dict)}
        file.write_text(json.dumps(raw | changes | inner))
        random_release.write_weights(read_part(file.parent), name, "F32", 0, False)
    return target


def get_config(stage: str = "kontext"):
    """A short run of a stage, whose parts are to be named."""
    from unipic_jax.train.config import nano

    if stage == "answer":
        config = nano(describe=1.0)
        config.data.text_tokens = 40
        config.objective, config.trained = "answer", ("mllm",)
    elif stage == "reconstruction":
        config = nano(generate=1.0)
        config.objective, config.trained = "reconstruction", ("vae",)
    else:
        config = nano(generate=1.0, edit=1.0)
        config.trained = {"kontext": ("transformer",), "align": ("conditioner",),
                          "unified": ("conditioner", "transformer")}[stage]
    config.data.pixels = 16 * 16
    config.batch, config.steps = 8, 6
    config.optimizer.learning_rate = 1e-2
    config.log_every = 1
    config.checkpoint.every = 2
    config.samples.update({"count": 0, "blocks": 0, "steps": 2})
    return config


def point(config, root: Path):
    """The same config with the parts of the model in `root`."""
    if config.objective not in ("answer", "judgement"):
        config.model = str(root / "kontext")
    if config.objective in ("answer", "judgement") or "conditioner" in config.trained:
        config.mllm = str(root / "metaquery/qwen2_5_vl")
    if "conditioner" in config.trained:
        config.conditioner = str(root / "metaquery/conditioner")
    return config


def start(
    workdir: Path, *arguments: str, devices: int = 1, command: str = "train", **environment: str
):
    """`unipic train`, or another command, in a process of its own with so many virtual devices."""
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
    return subprocess.Popen(
        [sys.executable, "-m", "unipic_jax", command, "--workdir", str(workdir), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
        | environment)


def finish(process) -> str:
    """What a process that ends well has said."""
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    return said


def arguments(stage: str, root: Path, **changes) -> list[str]:
    """Those of `unipic train` for a stage with the parts of the model in `root`."""
    config = point(get_config(stage), root)
    fields = {n: config[n] for n in ("model", "mllm", "conditioner")} | changes
    return [f"--config={ROOT}/tests/micro.py:{stage}",
            *(f"--config.{n}={v}" for n, v in fields.items())]
