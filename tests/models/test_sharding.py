"""Results do not depend on the mesh; the full-size model lowers on 64 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from jax.sharding import AxisType

from unipic_jax.core import mesh, params
from unipic_jax.models import autoencoder, clip_text, mmdit, t5_encoder

FULL = mmdit.Config(
    num_layers=24, attention_head_dim=64, num_attention_heads=24, in_channels=16, out_channels=16,
    patch_size=2, joint_attention_dim=4096, caption_projection_dim=1536,
    pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
    sample_size=128)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    shapes = {"latents": (8, 8, 8, 16), "timestep": (8,), "context": (8, 19, 96),
              "pooled": (8, 40), "reference": (8, 8, 8, 16)}
    return {k: draw.normal(size=s).astype(np.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def alone(kontext, batch, mmdit_apply):
    return mmdit_apply(*kontext["transformer"], **batch)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_transformer_is_the_same_on_any_mesh(sizes, kontext, batch, alone, mmdit_apply):
    cfg, weights = kontext["transformer"]
    m = mesh.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
    with jax.set_mesh(m):
        weights = jax.device_put(weights, params.shardings(mmdit.specs(cfg), m))
        x = {k: jax.device_put(v, mesh.batch_sharding(m, v.ndim)) for k, v in batch.items()}
        out = mmdit_apply(cfg, weights, **x)
    assert len(out.sharding.device_set) == np.prod(sizes)
    assert relative(out, alone) < 1e-5


def test_encoders_are_the_same_on_a_mesh(kontext):
    m = mesh.make(1, 4, 2)
    ids = np.random.default_rng(0).integers(0, 79, (4, 9))
    picture = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype(np.float32)
    for name, module, run, x in (
            ("text_encoder", clip_text, clip_text.apply, ids),
            ("text_encoder_3", t5_encoder, t5_encoder.apply, ids),
            ("vae", autoencoder, lambda c, p, x: autoencoder.decode(
                c, p, autoencoder.encode(c, p, x).mean), picture)):
        cfg, weights = kontext[name]
        f = jax.jit(run, static_argnums=0)
        want = jax.tree.leaves(f(cfg, weights, x))
        with jax.set_mesh(m):
            weights = jax.device_put(weights, params.shardings(module.specs(cfg), m))
            out = jax.tree.leaves(f(cfg, weights, jax.device_put(
                x, mesh.batch_sharding(m, x.ndim))))
        for a, b in zip(out, want):
            assert relative(a, b) < 1e-5, name


def test_full_size_has_the_released_number_of_parameters():
    assert params.count(mmdit.specs(FULL)) == 2_469_663_936


@pytest.mark.parametrize("sizes", [(1, 64, 1), (2, 16, 2)])
def test_full_size_lowers_for_64_tpus(sizes):
    """Forward and gradient of the released model at 512x512 with a reference, batch 128."""
    m = jax.sharding.AbstractMesh(sizes, mesh.AXES, (AxisType.Explicit,) * 3)
    weights = params.abstract(mmdit.specs(FULL), jnp.bfloat16, m)
    assert weights["dual"]["image"]["up"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")

    def spread(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16,
                                    sharding=mesh.batch_sharding(m, len(shape)))

    B = 128
    x = (spread(B, 64, 64, 16), spread(B), spread(B, 333, 4096), spread(B, 2048),
         spread(B, 64, 64, 16))

    def loss(weights, *x):
        return jnp.mean(mmdit.apply(FULL, weights, *x, remat="attention").astype(jnp.float32) ** 2)

    with jax.sharding.use_abstract_mesh(m):
        out = jax.eval_shape(lambda w, *x: mmdit.apply(FULL, w, *x), weights, *x)
        assert out.shape == (B, 64, 64, 16)
        assert out.sharding.spec[0] == mesh.BATCH
        traced = jax.jit(jax.grad(loss)).trace(weights, *x)
        grads = traced.out_info
        for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(weights)):
            assert g.shape == w.shape
        lowered = traced.lower(lowering_platforms=("tpu",))
    assert "sdy.sharding" in lowered.as_text()
