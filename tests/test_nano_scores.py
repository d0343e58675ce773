"""The accuracy that comes with the shipped model, measured again on fewer of its scenes."""

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
FOLDER = load.find("nano")
CLAIM = json.loads(FOLDER.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def measured():
    """The scores of both tasks, with the steps and the guidance of the claim."""
    config = nano(generate=1.0)
    config.model = "nano"
    config.samples.update({k: CLAIM[k] for k in ("steps", "guidance_scale")})
    mesh = meshes.make(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        _, params = stage.parameters(config, here, mesh)
        draw = evaluate.drawer(config, here, mesh)
        return {task: evaluate.drawn_scores(draw, params, task, PER_KIND)
                for task in ("generate", "edit")}


@pytest.mark.parametrize(("task", "figure"), [
    ("generate", "exact"), ("edit", "exact"), ("edit", "preserved")])
def test_the_claim_holds(task, figure, measured):
    """Within three standard errors of so few scenes."""
    found, claim = measured[task][figure], CLAIM["scores"][task][figure]
    scenes = PER_KIND * len(blocks.KINDS[task])
    assert claim > 0.5
    assert abs(found - claim) <= 3 * math.sqrt(claim * (1 - claim) / scenes)


def test_it_is_small():
    assert 1e6 < sum(f.stat().st_size for f in FOLDER.rglob("*.safetensors")) < 16e6
