"""Operations counted from jaxprs, against XLA's count and by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core import remat, splash
from unipic_jax.core.attention import attention
from unipic_jax.plan import count


def counted(f, *shapes, width=1):
    return count.operations(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)), width)


def by_xla(f, *shapes):
    compiled = jax.jit(f).lower(*(jnp.zeros(s) for s in shapes)).compile()
    return compiled.cost_analysis()["flops"]


def products(x, w, v):
    return jnp.einsum("bmk,bkn->bmn", x @ w, v)


def convolution(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID",
                                    dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(("f", "shapes"), [
    (products, [(3, 64, 32), (32, 16), (3, 16, 8)]),
    (convolution, [(2, 16, 16, 8), (3, 3, 8, 24)])])
def test_as_xla_counts(f, shapes):
    assert counted(f, *shapes).total == pytest.approx(by_xla(f, *shapes), rel=1e-3)


def test_scans_branches_and_what_is_computed_again():
    def layer(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w), None

    def loss(x, w):
        return lax.scan(jax.checkpoint(layer), x, w)[0].sum()

    one = 2 * 16 * 32 * 32
    assert counted(loss, (16, 32), (5, 32, 32)).total == 5 * 2 * one
    # Forward, both products again, and two for each gradient.
    assert counted(jax.grad(loss, (0, 1)), (16, 32), (5, 32, 32)).total == 5 * (2 + 2 + 4) * one

    def branch(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert counted(branch, (16, 32), (32, 32)).total == 2 * one


def test_products_fill_the_unit_or_do_not():
    """Heads of 64 fill half of a unit of 128, and a quarter of one of 256."""
    def scores(q, k):
        return q @ k.T

    for width, waste in ((128, 2), (256, 4)):
        found = counted(scores, (1024, 64), (1024, 64), width=width)
        assert found.total == 2 * 1024 * 1024 * 64
        assert found.padded == waste * found.total


def test_the_attention_kernel_counts_by_its_grid():
    """Two products forwards; backwards five, as one kernel has the scores anew for all gradients,
    and the sums of outputs with their gradients. What is kept is not computed again."""
    B, T, S, H, K = 2, 1024, 512, 2, 64
    q, k = jnp.zeros((B, T, H, K)), jnp.zeros((B, S, H, K))

    def f(q, k, v):
        return splash.splash(q, k, v, causal=False, scale=1.0).sum()

    one = 2 * B * H * T * S * K
    assert count.operations(jax.make_jaxpr(f)(q, k, k), 1).total == 2 * one
    for policy, again in (("none", 0), ("attention", 0), ("full", 2)):
        slopes = jax.value_and_grad(remat.remat(f, policy), (0, 1, 2))
        both = count.operations(jax.make_jaxpr(slopes)(q, k, k), 1)
        assert both.total == (2 + 5 + again) * one + 2 * B * H * T * K


def test_layers_on_a_mesh_keep_what_their_kernel_needs():
    B, T, H, K, layers = 8, 512, 2, 64, 3
    mesh = meshes.make(data=2, fsdp=4)
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32, sharding=meshes.batch_sharding(mesh, 4))
    layer = remat.remat(lambda x, _: (attention(x, x, x, implementation="splash"), None),
                        "attention")
    with jax.set_mesh(mesh):
        made = jax.make_jaxpr(jax.grad(lambda x: lax.scan(layer, x, length=layers)[0].sum()))(x)
    assert count.operations(made, 1).total == layers * (7 * 2 * T + 2) * B * H * T * K


def test_shards_count_on_all_devices():
    mesh = meshes.make(data=2, fsdp=4)
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=meshes.batch_sharding(mesh, 2))
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.shard_map(lambda x: x @ x.T, out_specs=P(meshes.BATCH))).trace(x)
    assert count.operations(traced.jaxpr, 1).total == 8 * 2 * 2 * 2 * 32
