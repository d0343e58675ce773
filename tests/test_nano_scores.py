"""The accuracy that comes with the shipped nano family, measured again on fewer of its scenes."""

import json
import math

import jax
import pytest

from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.train import evaluate, stage
from unipic_jax.train.config import nano

PER_KIND = 8
FOUND = {name: folder for name, folder in load.SHIPPED.items() if folder.is_dir()}
TASKS = [(name, task) for name in FOUND for task in (
    ("describe",) if name == "nano-qwen" else ("generate", "edit"))]


def claims(name: str) -> dict:
    return json.loads(FOUND[name].with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def opened():
    """What draws with a shipped model and its parameters, or its stage and parameters."""
    kept = {}

    def open_one(name):
        if name in kept:
            return kept[name]
        config, claim = nano(generate=1.0), claims(name)
        if name == "nano-qwen":
            config.objective, config.mllm = "answer", name
        else:
            config.model = name
            config.mllm = "nano-qwen" if name == "nano-metaquery" else ""
            config.samples.update({k: claim[k] for k in ("steps", "guidance_scale")})
        mesh = meshes.make(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            here = stage.open_stage(config)
            _, params = stage.parameters(config, here, mesh)
        kept[name] = config, here, params, mesh
        return kept[name]

    return open_one


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_claims_hold(name, task, opened):
    """Within three standard errors of so many scenes, of each figure that a claim is made of."""
    config, here, params, mesh = opened(name)
    with jax.set_mesh(mesh):
        if task == "describe":
            found = evaluate.answer_scores(here, params, PER_KIND)
        else:
            draw = evaluate.drawer(config, here, mesh)
            found = evaluate.drawn_scores(draw, params, task, PER_KIND)
    claim = claims(name)["scores"][task]
    kinds = len(claim) - 1 - ("preserved" in claim)
    for figure in {"exact", "preserved"} & claim.keys():
        p = min(max(claim[figure], 0.01), 0.99)
        margin = 3 * math.sqrt(p * (1 - p) / (kinds * PER_KIND))
        assert abs(found[figure] - claim[figure]) <= margin, (figure, found, claim)


def test_the_family_is_small():
    size = sum(f.stat().st_size for folder in FOUND.values() for f in folder.rglob("*.safetensors"))
    assert 0 < size < 16e6
