"""Layers whose gradients are written out, against what JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core import ops, params

ROWS = (4, 3, 8)
LAYERS = {name: params.linear(*shape) for name, shape in {
    "gate": (8, 16, ("embed", "mlp")), "up": (8, 16, ("embed", "mlp")),
    "down": (16, 8, ("mlp", "embed"))}.items()}


def plain(p, x):
    def dense(layer, x):
        return jnp.einsum("btd,df->btf", x, layer["kernel"]) + layer["bias"]

    up = dense(p["up"], x)
    up = jax.nn.silu(dense(p["gate"], x)) * up if "gate" in p else jax.nn.silu(up)
    return dense(p["down"], up)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mesh", [None, dict(data=2, fsdp=2, tensor=2)])
def test_the_gradients_of_a_feed_forward(mesh, gated):
    p = params.init(LAYERS, jax.random.key(0))
    if not gated:
        del p["gate"]
    x, g = (jax.random.normal(jax.random.key(i), ROWS) for i in (1, 2))
    want = jax.vjp(plain, p, x)
    want = want[0], *want[1](g)

    def both(p, x, g):
        y, back = jax.vjp(lambda p, x: ops.feed_forward(p, x, jax.nn.silu), p, x)
        return y, *back(g)

    if mesh:
        mesh = meshes.make(**mesh)
        where = {n: s for n, s in params.shardings(LAYERS, mesh).items() if n in p}
        p, (x, g) = jax.device_put(p, where), (
            jax.device_put(a, meshes.batch_sharding(mesh, 3)) for a in (x, g))
    with jax.set_mesh(mesh) if mesh else jax.default_matmul_precision("highest"):
        got = jax.jit(both)(p, x, g)
    if mesh:  # gradients lie where their weights do
        assert got[1]["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
        assert got[2].sharding.spec == x.sharding.spec
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("spec", [P("fsdp", "tensor"), P("tensor", "fsdp"), P(None, "fsdp")])
def test_a_gradient_is_summed_where_its_part_lies(spec):
    """Over `fsdp` by a reduce-scatter; an all-reduce would bring all of it to every device."""
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((8, 3, 16), (16, 32))))
    slope = jax.jit(jax.grad(lambda w, x: (ops.linear({"kernel": w}, x) ** 2).sum()))
    want = slope(w, x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, P(
            meshes.BATCH, None, "tensor" if spec[0] == "tensor" else None)))
        w = jax.device_put(w, jax.NamedSharding(mesh, spec))
        found, program = slope(w, x), slope.lower(w, x).as_text()
    assert program.count("reduce_scatter") == 1
    assert found.sharding.spec == spec
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-4)
