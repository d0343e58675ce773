"""Qwen2.5-VL-7B as released, and the conditioner after it, lower on 64 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from unipic_jax.conditioning import metaquery
from unipic_jax.core import mesh, params
from unipic_jax.models import connector
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import vision

FULL = qwen.Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, vocab_size=152064, mrope_section=(16, 24, 24), image_token_id=151655,
    video_token_id=151656, vision_start_token_id=151652,
    vision=qwen.VisionConfig(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                             out_hidden_size=3584))
CONNECTOR = connector.Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=24, num_attention_heads=24,
    llm_hidden_size=3584, pooled_projection_dim=2048, joint_attention_dim=4096)


def test_full_size_has_the_released_number_of_parameters():
    assert params.count(qwen.specs(FULL)) == 8_292_166_656


@pytest.mark.parametrize("sizes", [(1, 64, 1), (2, 8, 4)])
def test_full_size_lowers_for_64_tpus(sizes):
    """An edit's conditions at 512x512, and the conditioner's gradient through the frozen model."""
    m = jax.sharding.AbstractMesh(sizes, mesh.AXES, (AxisType.Explicit,) * 3)
    weights = params.abstract(qwen.specs(FULL), jnp.bfloat16, m)
    assert weights["layers"]["gate"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    assert weights["layers"]["k"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    mine = params.abstract(connector.specs(CONNECTOR), jnp.bfloat16, m)
    B, S, Q = 64, 320, CONNECTOR.num_queries
    grid = np.array([[1, 32, 32]])
    windows = vision.count_windows(FULL.vision, grid)

    def spread(dtype, *shape, at=0):
        spec = [None] * len(shape)
        spec[at] = mesh.BATCH
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(m, jax.P(*spec)))

    inputs = metaquery.Inputs(
        spread(jnp.int32, B, S), spread(bool, B, S + Q), spread(jnp.int32, 3, B, S + Q, at=1),
        vision.Pictures(spread(jnp.float32, B, windows, 64, 1176),
                        spread(jnp.int32, B, windows, 64, 2),
                        spread(jnp.int32, B, windows, 64), spread(jnp.int32, B, windows * 16)))

    def run(weights, mine, inputs):
        return metaquery.apply(FULL, CONNECTOR, weights, mine, inputs, dtype=jnp.bfloat16,
                               remat="attention")

    def loss(mine, weights, inputs):
        return sum(jnp.mean(a.astype(jnp.float32) ** 2)
                   for a in jax.tree.leaves(run(weights, mine, inputs)))

    with jax.sharding.use_abstract_mesh(m):
        out = jax.eval_shape(run, weights, mine, inputs)
        assert out["context"].shape == (B, Q, 4096)
        assert out["pooled"].shape == (B, 2048)
        assert all(a.sharding.spec[0] == mesh.BATCH for a in out.values())
        traced = jax.jit(jax.grad(loss)).trace(mine, weights, inputs)
        lowered = traced.lower(lowering_platforms=("tpu",))
    for g, w in zip(jax.tree.leaves(traced.out_info), jax.tree.leaves(mine), strict=True):
        assert g.shape == w.shape
    assert "sdy.sharding" in lowered.as_text()
