"""Adapters: what they add to a layer, alone and in a scanned stack, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from jax import lax

from unipic_jax.core import lora, mesh, ops, params
from unipic_jax.core.errors import InputError
from unipic_jax.models import mmdit

D, F, R, SCALE = 16, 32, 4, 2.5
BASE = {"layers": params.stack({"up": params.linear(D, F, ("embed", "mlp")),
                                "down": params.linear(F, D, ("mlp", "embed"), bias=False)}, 3),
        "out": params.linear(D, D, ("embed", "heads"))}
SPECS = lora.specs(BASE, ("layers/*", "out"), R)


def apply(p, x):
    def body(x, layer):
        return x + ops.linear(layer["down"], jnp.tanh(ops.linear(layer["up"], x))), None

    return ops.linear(p["out"], lax.scan(body, x, p["layers"])[0])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def weights():
    """Base parameters, adapters with a B that is not zero, and a batch."""
    base = params.init(BASE, jax.random.key(0))
    adapters = {k: jax.tree.map(lambda s: 0.3 * normal(len(s.shape), *s.shape), v,
                                is_leaf=params.is_spec) for k, v in SPECS.items()}
    return base, adapters, normal(9, 8, 5, D)


def loss_joined(base, adapters, x):
    return jnp.sum(jnp.sin(apply(lora.join(base, adapters, SCALE), x)))


def test_specs_follow_the_kernels():
    up, down = SPECS["layers"]["up"], SPECS["layers"]["down"]
    assert (up["lora_a"].shape, up["lora_a"].axes) == ((3, D, R), ("layers", "embed", None))
    assert (up["lora_b"].shape, up["lora_b"].axes) == ((3, R, F), ("layers", None, "mlp"))
    assert (down["lora_a"].axes, down["lora_b"].axes) == (
        ("layers", "mlp", None), ("layers", None, "embed"))
    assert SPECS["out"]["lora_a"].axes == ("embed", None)
    fresh = params.init(lora.specs({"wide": params.linear(4000, 8, (None, None))}, ["*"], R),
                        jax.random.key(0))
    assert abs(float(fresh["wide"]["lora_a"].std()) * R - 1) < 0.02
    assert not fresh["wide"]["lora_b"].any()


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(InputError, match="no dense layer is called 'layers/q'"):
        lora.specs(BASE, ("layers/*", "layers/q"), R)
    with pytest.raises(InputError, match="no dense layer"):
        lora.specs({"conv": params.conv(3, 4, 3)}, ("conv",), R)
    with pytest.raises(InputError, match="rank"):
        lora.specs(BASE, ("out",), 0)


def test_targets_of_the_transformer_are_those_of_flow_grpo():
    cfg = mmdit.Config(
        num_layers=24, attention_head_dim=64, num_attention_heads=24, in_channels=16,
        out_channels=16, patch_size=2, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
    tree = lora.specs(mmdit.specs(cfg), mmdit.LORA_TARGETS, 32)
    assert "image2" not in tree["dual"]
    assert set(tree["plain"]["image"]) == set(tree["plain"]["text"]) == {"q", "k", "v", "out"}
    # 24 blocks of 8 layers, but for the last one's text output.
    assert params.count(tree) == (24 * 8 - 1) * 2 * 1536 * 32


def test_joined_equals_merged(weights):
    base, adapters, x = weights
    joined = jax.jit(apply)(lora.join(base, adapters, SCALE), x)
    assert relative(joined, jax.jit(apply)(lora.merge(base, adapters, SCALE), x)) < 1e-6
    assert relative(joined, jax.jit(apply)(base, x)) > 0.1


def test_merged_keeps_the_type_and_the_rest(weights):
    base, adapters, _ = weights
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), base)
    merged = lora.merge(half, {"out": adapters["out"]}, SCALE)
    a, b = adapters["out"]["lora_a"], adapters["out"]["lora_b"]
    want = half["out"]["kernel"].astype(jnp.float32) + SCALE * (a @ b)
    assert (merged["out"]["kernel"] == want.astype(jnp.bfloat16)).all()
    assert merged["layers"]["up"]["kernel"] is half["layers"]["up"]["kernel"]


def test_a_fresh_adapter_changes_nothing(weights):
    base, _, x = weights
    joined = lora.join(base, params.init(SPECS, jax.random.key(1)), SCALE)
    assert (jax.jit(apply)(joined, x) == jax.jit(apply)(base, x)).all()


def test_gradients_equal_those_through_the_merged_kernels(weights):
    base, adapters, x = weights

    def loss_merged(base, adapters, x):
        return jnp.sum(jnp.sin(apply(lora.merge(base, adapters, SCALE), x)))

    got = jax.jit(jax.grad(loss_joined, argnums=1))(base, adapters, x)
    want = jax.jit(jax.grad(loss_merged, argnums=1))(base, adapters, x)
    assert all(e < 1e-5 for e in jax.tree.leaves(jax.tree.map(relative, got, want)))


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 8, 1), (2, 2, 2)])
def test_adapters_are_the_same_on_any_mesh(sizes, weights):
    base, adapters, x = weights
    value, grads = jax.jit(jax.value_and_grad(loss_joined, argnums=1))(base, adapters, x)
    merged = lora.merge(base, adapters, SCALE)
    m = mesh.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
    with jax.set_mesh(m):
        base = jax.device_put(base, params.shardings(BASE, m))
        adapters = jax.device_put(adapters, params.shardings(SPECS, m))
        x = jax.device_put(x, mesh.batch_sharding(m, x.ndim))
        spread, spread_grads = jax.jit(jax.value_and_grad(loss_joined, argnums=1))(
            base, adapters, x)
        spread_merged = jax.jit(lora.merge)(base, adapters, SCALE)
    assert abs(float(spread) - float(value)) < 1e-5 * abs(float(value))
    for spec, a, b in zip(jax.tree.leaves(params.shardings(SPECS, m)),
                          jax.tree.leaves(spread_grads), jax.tree.leaves(grads)):
        assert relative(a, b) < 1e-5
        assert a.sharding.is_equivalent_to(spec, a.ndim)
    for spec, a, b in zip(jax.tree.leaves(params.shardings(BASE, m)),
                          jax.tree.leaves(spread_merged), jax.tree.leaves(merged)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert a.sharding.is_equivalent_to(spec, a.ndim)
