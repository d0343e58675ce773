"""Specs and what is derived from them, configs, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unipic_jax.core import config, mesh, params
from unipic_jax.core.errors import InputError
from unipic_jax.models import mmdit

SPECS = {"a": params.linear(8, 6, ("embed", "heads")), "n": params.norm(8),
         "s": params.stack({"w": params.Spec((8, 3), ("embed", None),
                                             jax.nn.initializers.lecun_normal())}, 4)}


def test_everything_is_derived_from_the_specs():
    made = params.init(SPECS, jax.random.key(0))
    shapes = params.abstract(SPECS, jnp.bfloat16)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda a: a.shape, shapes)
    assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
    assert params.count(SPECS) == sum(a.size for a in jax.tree.leaves(made)) == 8*6 + 6 + 16 + 96


def test_a_stack_is_initialized_layer_by_layer():
    wide = params.stack({"w": params.Spec((512, 64), (None, None),
                                          jax.nn.initializers.lecun_normal())}, 6)
    w = np.asarray(params.init(wide, jax.random.key(1))["w"])
    assert abs(w.std() * np.sqrt(512) - 1) < 0.02  # the fan-in of a layer, not of the stack
    assert np.abs(np.corrcoef(w.reshape(6, -1)) - np.eye(6)).max() < 0.05


def test_roles_become_mesh_axes_where_they_divide():
    m = mesh.make(2, 2, 2)
    s = params.shardings(SPECS, m)
    assert s["a"]["kernel"].spec == P("fsdp", "tensor")
    assert s["a"]["bias"].spec == P("tensor")
    assert s["s"]["w"].spec == P(None, "fsdp", None)
    assert mesh.sharding(m, (7, 6), ("embed", "heads")).spec == P(None, "tensor")
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        mesh.make(3, 1, 1)
    assert mesh.make(tensor=2).axis_sizes == (1, 4, 2)


def test_initial_positions_are_the_reference_sinusoids():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    cfg = mmdit.Config(2, 8, 3, 4, 4, 2, 20, 24, 10, 12, (), 16)
    table = params.init({"p": mmdit.specs(cfg)["positions"]}, jax.random.key(0))["p"]
    want = get_2d_sincos_pos_embed(24, 12, base_size=8, output_type="pt").numpy()
    assert np.array_equal(table, want.astype(np.float32))


@pytest.mark.parametrize(("change", "message"), [
    ({"extra": 1}, "x.json: unknown key 'extra'"),
    ({"num_layers": "four"}, "x.json: num_layers = \"four\" is not int"),
    ({"num_layers": -4}, "x.json: num_layers = -4 is negative"),
    ({"num_layers": True}, "num_layers = true is not int"),
    ({"num_layers": None}, "num_layers"),
    ({"qk_norm": "layer_norm"}, "x.json: qk_norm = \"layer_norm\" is not supported"),
    ({"caption_projection_dim": 25}, "caption_projection_dim = 25"),
    ({"dual_attention_layers": [0, 9]}, "dual_attention_layers"),
])
def test_a_config_that_is_not_understood_is_refused_by_name(change, message):
    raw = dict(num_layers=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
               out_channels=4, patch_size=2, joint_attention_dim=20, caption_projection_dim=24,
               pooled_projection_dim=10, pos_embed_max_size=12, dual_attention_layers=[0],
               sample_size=16, qk_norm="rms_norm", _class_name="SD3Transformer2DModel")
    assert mmdit.Config.from_json(raw, "x.json").width == 24
    with pytest.raises(InputError) as e:
        mmdit.Config.from_json(raw | change, "x.json")
    assert message in str(e.value)
    with pytest.raises(InputError, match="'in_channels' is missing"):
        mmdit.Config.from_json({k: v for k, v in raw.items() if k != "in_channels"}, "x.json")


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        config.read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        config.read_json(tmp_path / "bad.json")
