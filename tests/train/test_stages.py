"""Every stage of `configs/`: what trains, and what is frozen."""

import jax
import jax.numpy as jnp
import micro
import pytest
from conftest import ROOT
from full_size import opened
from jax.sharding import AxisType

from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.train import stage


@pytest.mark.parametrize(("name", "trained"), [
    ("kontext", {"transformer"}), ("align", {"conditioner"}),
    ("unified", {"conditioner", "transformer"}),
    ("nano/autoencoder", {"vae"}), ("nano/language", {"mllm"}),
    ("nano/base", {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}),
    ("nano/kontext", {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}),
    ("nano/align", {"conditioner"}), ("nano/judge", {"mllm", "judge"}),
    ("edit_judge", {"mllm", "judge"}), ("pdtr_edit_512", {"transformer"}),
    ("pdtr_t2i_512", {"transformer"}), ("pods", {"transformer"}),
    ("nano/unified", {"conditioner", "transformer"}),
    ("nano/demo", {"transformer"}), ("nano/demo_rl", {"transformer"}),
    ("nano/rl_edit", {"transformer"}), ("nano/rl_generate", {"transformer"})])
def test_what_trains_and_what_is_frozen(name, trained, released):
    root = micro.NANO if name.startswith("nano") else released
    config, here = opened(name, root)
    assert set(here.trained) == trained
    mesh = jax.sharding.AbstractMesh((1, 1, 1), meshes.AXES, (AxisType.Explicit,) * 3)
    own, frozen = stage.abstract(config, here, mesh)
    assert set(own) == trained
    assert {a.dtype for a in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(frozen)} <= {jnp.dtype(config.dtype)}
    assert config.dtype == ("float32" if name.startswith("nano") else "bfloat16")
    whole = jax.eval_shape(here.combine, own, frozen)
    for part, p in here.parts.items():
        if p.has_weights and not (config.lora.rank and part in trained):
            want = params.abstract(p.specs)
            assert jax.tree.map(jnp.shape, whole[part]) == jax.tree.map(jnp.shape, want)


def test_every_config_is_tried():
    found = {str(f.relative_to(ROOT / "configs").with_suffix("")) for f in
             (ROOT / "configs").rglob("*.py") if "def get_config" in f.read_text()}
    mark, = test_what_trains_and_what_is_frozen.pytestmark
    assert {name for name, _ in mark.args[1]} == found


@pytest.mark.parametrize(("changes", "message"), [
    ({"objective": "imitation"}, "objective 'imitation': choose from velocity"),
    ({"trained": ("decoder",)}, "'decoder' is not a part of this stage; its parts are transformer"),
    ({"fresh": ("vae",)}, "'vae' is to be initialized anew but does not train"),
    ({"whole": ("transformer",)}, "'transformer' is to be held whole and is not a frozen part"),
    ({"model": "nowhere"}, "nowhere"),
    ({"model": ""}, "give --config.model=DIR"),
    ({"objective": "answer"}, "give --config.mllm=DIR")])
def test_stages_that_cannot_be(changes, message, micro_model):
    config = micro.point(micro.get_config("kontext"), micro_model)
    config.update(changes)
    with pytest.raises(InputError, match=message):
        stage.open_stage(config)
