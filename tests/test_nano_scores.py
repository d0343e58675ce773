"""The accuracy that comes with the shipped models, measured again on fewer of their scenes."""

import functools
import json
import math

import jax
import pytest

from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.data import blocks
from unipic_jax.train import evaluate, stage
from unipic_jax.train.config import nano

PER_KIND = 8


def claim(name):
    return json.loads(load.find(name).with_suffix(".json").read_text())


@functools.cache
def measured(name):
    """The scores of all tasks, with the steps and the guidance of the claim."""
    config = nano(generate=1.0)
    if name == "nano-qwen2.5-vl":
        config.objective, config.mllm = "answer", name
    else:
        config.model = name
        config.mllm = "nano-qwen2.5-vl" if name == "nano-metaquery" else ""
        config.samples.update({k: claim(name)[k] for k in ("steps", "guidance_scale")})
    mesh = meshes.make(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        _, params = stage.parameters(config, here, mesh)
        if config.objective == "answer":
            return {"describe": evaluate.answer_scores(here, params, PER_KIND)}
        draw = evaluate.drawer(config, here, mesh)
        return {task: evaluate.drawn_scores(draw, params, task, PER_KIND)
                for task in ("generate", "edit")}


@pytest.mark.parametrize(("name", "task", "figure"), [
    *((name, *figure) for name in ("nano", "nano-metaquery") for figure in (
        ("generate", "exact"), ("edit", "exact"), ("edit", "preserved"))),
    ("nano-qwen2.5-vl", "describe", "exact")])
def test_the_claim_holds(name, task, figure):
    """Within three standard errors of so few scenes, and one scene."""
    found, claimed = measured(name)[task][figure], claim(name)["scores"][task][figure]
    scenes = PER_KIND * len(blocks.KINDS[task])
    assert claimed > 0.5
    assert abs(found - claimed) <= 3 * math.sqrt(claimed * (1 - claimed) / scenes) + 1 / scenes


def test_they_are_small():
    sizes = [f.stat().st_size for name in load.SHIPPED
             for f in load.find(name).rglob("*.safetensors")]
    assert 1e6 < sum(sizes) < 16e6
