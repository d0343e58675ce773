"""Programs compiled for TPUs that are not here, by libtpu's compiler."""

import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.experimental import topologies

from unipic_jax.core import mesh as meshes
from unipic_jax.core.attention import attention

sys.path.append(str(ROOT / ".venv/tpu"))  # where it disturbs no other program
pytest.importorskip("libtpu")


@pytest.fixture(params=["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def mesh(request, monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    described = topologies.get_topology_desc(topology_name=request.param, platform="tpu")
    return meshes.make(devices=described.devices)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_compiles_forward_and_backward(mesh, causal):
    """Heads of 64, a length that is no multiple of a block, and segments with causal order."""
    def loss(q, k, v, *segments):
        out = attention(q, k, v, causal=causal, segments=segments or None)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def rows(*shape, dtype=jnp.bfloat16):
        sharding = jax.NamedSharding(mesh, jax.P(meshes.BATCH, *[None] * len(shape)))
        return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=sharding)

    x, numbers = rows(1357, 4, 64), rows(1357, dtype=jnp.int32)
    # Of bfloat16 the compiler takes no products of a higher precision.
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        traced = step.trace(x, x, x, *[numbers] * (2 * causal))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 2  # forward, and one of the gradient
    # No scores are ever held: they would be 1357 x 1357 of each of 4 heads.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 1357 * 1357 * 2


@pytest.mark.parametrize("topology", ["v6e:8x8", "v5p:4x4x4"])
def test_a_mesh_that_no_whole_axes_of_the_torus_make(topology, monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    made = meshes.make(data=-1, fsdp=16, devices=devices)
    assert dict(made.shape) == {"data": 4, "fsdp": 16, "tensor": 1}
    assert set(made.devices.flat) == set(devices)
