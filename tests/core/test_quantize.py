"""Frozen weights as eight-bit integers."""

import builtins
import dataclasses

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from PIL import Image

from unipic_jax.core import mesh as meshes
from unipic_jax.core import ops, quantize
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks
from unipic_jax.train import stage


def test_no_weight_is_off_by_more_than_half_a_step():
    rng = np.random.default_rng(0)
    columns = np.exp(rng.normal(size=(3, 1, 48)))
    w = jnp.asarray(columns * rng.normal(size=(3, 64, 48)), jnp.float32)
    tree = {"kernel": w, "bias": w[0, 0]}
    found = quantize.quantize(tree)
    assert found["kernel"].qvalue.dtype == jnp.int8
    assert found["bias"] is tree["bias"]
    error = jnp.abs(quantize.dense(found["kernel"], jnp.float32) - w)
    assert jnp.all(error <= jnp.abs(w).max(1, keepdims=True) / 254 * 1.001)
    x = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    one = jax.tree.map(lambda a: a[0], found["kernel"])
    np.testing.assert_allclose(ops.linear({"kernel": one}, x),
                               x @ quantize.dense(one, jnp.float32), rtol=1e-6)


@pytest.fixture
def config(micro_model):
    config = micro.point(micro.get_config("unified"), micro_model)
    config.batch = 8
    return config


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_shapes_and_shardings_are_those_of_the_weights(config, sizes):
    config.int8 = ("mllm",)
    mesh = meshes.make(*sizes)
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        _, frozen = stage.parameters(config, here, mesh)
    _, expected = stage.abstract(config, here, mesh)
    leaves = jax.tree.leaves(expected["mllm"])
    assert {a.dtype for a in leaves} >= {jnp.dtype("int8"), jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(frozen["mllm"]), leaves, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    kept = sum(a.size * a.dtype.itemsize for a in leaves)
    whole = sum(a.size * 4 for a in jax.tree.leaves(frozen["mllm"]))
    assert kept < 0.5 * whole  # the embedding stays as it is


def loss_and_gradient(config, *parts):
    """Of a batch of edits, with parts kept as integers."""
    def small(a):
        return np.asarray(Image.fromarray(a).resize((16, 16)))

    config.int8 = parts
    examples = [dataclasses.replace(e, target=small(e.target), source=small(e.source))
                for e in (blocks.edit(0, i).example for i in range(8))]
    mesh = meshes.make(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        trained, frozen = stage.parameters(config, here, mesh)
        keys = jax.random.split(jax.random.key(1), 8)
        loss, gradient = jax.jit(jax.value_and_grad(
            lambda t, f, b: here.loss(t, f, b, keys)[0].mean()))(
                trained, frozen, here.collate["edit"](examples))
    return loss, gradient["conditioner"]


def test_a_stage_with_an_encoder_in_int8(config):
    """The loss of an edit through MetaQuery and the gradients of queries and connector, which come
    through the language model."""
    (a, g), (b, h) = loss_and_gradient(config), loss_and_gradient(config, "mllm")
    assert a != b
    assert abs(a - b) < 1e-3 * a
    both = zip(jax.tree.leaves(g), jax.tree.leaves(h), strict=True)
    norm = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(g)) ** 0.5
    assert sum(float(jnp.square(x - y).sum()) for x, y in both) ** 0.5 < 0.02 * norm


@pytest.mark.parametrize("name", ["transformer", "decoder"])
def test_what_is_not_frozen_cannot_be(config, name):
    config.int8 = (name,)
    with pytest.raises(InputError, match=f"'{name}' is to be kept as integers"):
        stage.open_stage(config)


def test_without_qwix(monkeypatch):
    imported = builtins.__import__

    def without(name, *more):
        if name == "qwix":
            raise ImportError
        return imported(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'unipic_jax\[int8\]'"):
        quantize.quantize({"kernel": jnp.ones((4, 4))})

