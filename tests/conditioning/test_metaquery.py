"""MetaQuery's prompts and conditions against the goldens, and what padding must not change."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, relative
from PIL import Image

from unipic_jax.conditioning import metaquery, qwen_chat
from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.core import params as params_lib
from unipic_jax.core.errors import InputError
from unipic_jax.model import read_part
from unipic_jax.models import connector
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language, rope, vision

FOLDER = GOLDENS / "metaquery" / "qwen2_5_vl"
CONDITIONER = GOLDENS / "metaquery" / "conditioner"

apply = jax.jit(metaquery.apply, static_argnames=("qwen_cfg", "cfg", "dtype", "remat"))


@pytest.fixture(scope="module")
def model():
    """Both configs and both parameters, as `metaquery.apply` takes them."""
    parts = [read_part(f) for f in (FOLDER, CONDITIONER)]
    return (*(p.config for p in parts), *(load.read(p, jnp.float32) for p in parts))


@pytest.fixture(scope="module")
def chat():
    return qwen_chat.open_chat(FOLDER)


def prepare(chat, model, *args, **kw):
    return metaquery.prepare(chat, model[0], model[1].num_queries, *args, **kw)


@pytest.fixture(scope="module")
def inputs(chat, model, golden, meta):
    """The goldens' rows, [prompt, negative], of both tasks."""
    picture = Image.fromarray(golden["edit/resized"])
    return {
        "metaquery_t2i": prepare(chat, model, [meta["prompt"], ""]),
        "metaquery_edit": prepare(chat, model, [meta["edit_prompt"], meta["negative_prompt"]],
                                  [picture] * 2)}


TASKS = ["metaquery_t2i", "metaquery_edit"]


@pytest.mark.parametrize("task", TASKS)
def test_ids_and_mask_equal_golden(task, inputs, golden):
    ids, mask = golden[f"{task}/input_ids"], golden[f"{task}/attention_mask"]
    S, got = ids.shape[1], inputs[task]
    assert S < got.ids.shape[1] == got.mask.shape[1] - 16
    np.testing.assert_array_equal(got.mask[:, :S], mask)
    assert not got.mask[:, S:-16].any()
    assert got.mask[:, -16:].all()
    np.testing.assert_array_equal(got.ids[:, :S] * mask, ids * mask)
    np.testing.assert_array_equal(got.positions[:, :, -16:] - mask.sum(1)[:, None],
                                  np.tile(np.arange(16), (3, 2, 1)))


def test_pixels_and_vision_equal_golden(inputs, golden, model):
    pictures = inputs["metaquery_edit"].pictures
    want = vision.pack(model[0].vision, [
        (p, g[None]) for p, g in zip(np.split(golden["metaquery_edit/pixel_values"], 2),
                                     golden["metaquery_edit/grid_thw"])]
    ) if len(golden["metaquery_edit/pixel_values"]) == 96 else None
    for a, b in zip(pictures, want):
        np.testing.assert_array_equal(a, b)
    see = jax.jit(vision.apply, static_argnames="cfg")
    seen = see(model[0].vision, model[2]["vision"], pictures)[:, :12]
    assert relative(seen.reshape(24, -1), golden["metaquery_edit/vision_embeds"]) < 1e-5


@pytest.mark.parametrize("task", TASKS)
def test_states_and_conditions_equal_golden(task, inputs, golden, model):
    out = apply(*model, inputs[task])
    assert relative(out["context"], golden[f"{task}/embeds"]) < 1e-5
    assert relative(out["pooled"], golden[f"{task}/pooled"]) < 1e-5
