"""Every implementation against PyTorch's, values and gradients, on a mesh too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative
from jax._src.cudnn import fused_attention_stablehlo
from jax.interpreters.partial_eval import dce_jaxpr

from unipic_jax.core import attention as module
from unipic_jax.core import mesh, remat
from unipic_jax.core.attention import attention
from unipic_jax.core.splash import splash


def inputs(T, S, H=4, G=4, K=16, B=2):
    draw = np.random.default_rng(T + S)
    return [draw.normal(size=s).astype(np.float32)
            for s in ((B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K))]


def theirs(q, k, v, weights, **kw):
    q, k, v = (torch.tensor(a, requires_grad=True) for a in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *(a.transpose(1, 2) for a in (q, k, v)), enable_gqa=True, **kw).transpose(1, 2)
    (out * torch.tensor(weights)).sum().backward()
    return [a.detach().numpy() for a in (out, q.grad, k.grad, v.grad)]


def ours(q, k, v, weights, **kw):
    def loss(q, k, v):
        out = attention(q, k, v, **kw)
        return jnp.sum(out * weights), out
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [out, *grads]


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
@pytest.mark.parametrize(("T", "S", "G"), [(40, 40, 4), (300, 37, 2), (517, 600, 1)])
def test_equals_pytorch_with_gradients(implementation, T, S, G):
    """Lengths under, over and not a multiple of the block; grouped queries."""
    args = inputs(T, S, G=G)
    for a, b in zip(ours(*args, implementation=implementation), theirs(*args)):
        assert relative(a, b) < 2e-6


def test_causal_bias_and_scale_equal_pytorch():
    args = inputs(33, 33)
    for a, b in zip(ours(*args, causal=True), theirs(*args, is_causal=True)):
        assert relative(a, b) < 2e-6
    bias = np.random.default_rng(0).normal(size=(4, 33, 33)).astype(np.float32)
    for a, b in zip(ours(*args, bias=bias, scale=0.7),
                    theirs(*args, attn_mask=torch.tensor(bias)[None], scale=0.7)):
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize("shape", [(2, 1, 300, 310), (2, 1, 1, 310), (2, 4, 300, 310), (300, 310)])
@pytest.mark.parametrize("causal", [False, True])
def test_blockwise_masks_as_xla_does(shape, causal):
    """Values and gradients with grouped queries; some queries may attend nowhere."""
    args = inputs(300, 310, G=2)
    mask = np.random.default_rng(0).random(shape) < 0.5
    (mask if mask.ndim == 2 else mask[0])[..., :1, :] = False
    both = [ours(*args, mask=jnp.asarray(mask), causal=causal, implementation=i)
            for i in ("blockwise", "xla")]
    for a, b in zip(*both):
        assert relative(a, b) < 2e-6


def test_blockwise_survives_large_scores():
    q, k, v, _ = inputs(300, 300)
    out = attention(100 * q, 100 * k, v, implementation="blockwise")
    want = attention(100 * q, 100 * k, v, implementation="xla")
    assert relative(out, want) < 1e-5


def test_blockwise_never_holds_all_scores():
    """Forward and gradient at 2048 tokens in less than a quarter of the scores' memory."""
    q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)

    def temporary(implementation):
        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, implementation=implementation) ** 2)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * 2048 * 2048 * 4
    assert temporary("blockwise") < scores / 4
    assert temporary("xla") > scores


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_same_on_a_mesh(implementation):
    q, k, v, _ = inputs(300, 300, B=4)
    want = jax.jit(lambda *a: attention(*a, implementation=implementation))(q, k, v)
    m = mesh.make(1, 4, 2)
    with jax.set_mesh(m):
        spec = jax.sharding.NamedSharding(m, jax.P(mesh.BATCH, None, "tensor", None))
        out = jax.jit(lambda *a: attention(*a, implementation=implementation))(
            *(jax.device_put(a, spec) for a in (q, k, v)))
    assert out.sharding.spec == spec.spec
    assert relative(out, want) < 1e-6


@pytest.mark.parametrize("shape", [(4, 1, 300, 300), (4, 4, 1, 300), (300, 300)])
def test_masked_blocks_are_the_same_on_a_mesh(shape):
    q, k, v, _ = inputs(300, 300, B=4)
    mask = np.random.default_rng(0).random(shape) < 0.5
    f = jax.jit(lambda *a: attention(*a[:3], mask=a[3], causal=True, implementation="blockwise"))
    want = f(q, k, v, mask)
    m = mesh.make(1, 4, 2)
    with jax.set_mesh(m):
        spec = jax.sharding.NamedSharding(m, jax.P(mesh.BATCH, None, "tensor", None))
        out = f(*(jax.device_put(a, spec) for a in (q, k, v)), mask)
    assert out.sharding.spec == spec.spec
    assert relative(out, want) < 1e-6


def test_what_cannot_be_done_is_refused():
    q, k, v, _ = inputs(8, 8)
    with pytest.raises(ValueError, match="choose from xla, blockwise, cudnn, splash"):
        attention(q, k, v, implementation="fast")
    with pytest.raises(ValueError, match="blockwise attention takes no bias; use xla"):
        attention(q, k, v, bias=jnp.zeros((8, 8)), implementation="blockwise")
    with pytest.raises(ValueError, match="cudnn attention takes no bias or mask or causal"):
        attention(q, k, v, causal=True, implementation="cudnn")
    with pytest.raises(ValueError, match="splash attention takes no bias or mask"):
        attention(q, k, v, mask=jnp.ones((8, 8), bool), implementation="splash")


@pytest.mark.parametrize(("platform", "asked", "want"), [
    ("gpu", (), "cudnn"), ("gpu", ("causal",), "xla"), ("gpu", ("float32",), "xla"),
    ("tpu", (), "splash"), ("tpu", ("causal", "segments"), "splash"), ("tpu", ("bias",), "xla"),
    ("tpu", ("short",), "xla"), ("cpu", (), "blockwise"), ("cpu", ("bias",), "xla"),
    ("cpu", ("short",), "xla")])
def test_the_best_one_is_chosen_for_the_platform(platform, asked, want, monkeypatch):
    monkeypatch.setattr(module.meshes, "platform", lambda: platform)
    x = jnp.zeros((1, 100 if "short" in asked else 512, 2, 64),
                  jnp.float32 if "float32" in asked else jnp.bfloat16)
    assert module._choose(x, x, set(asked) - {"short", "float32"}) == want


def test_a_layer_keeps_what_the_gpus_kernel_needs(monkeypatch):
    """Its gradient runs the kernel forwards once, and not again; traced, for no GPU is here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    for policy, runs in (("attention", 1), ("full", 2)):
        layer = remat.remat(lambda x: attention(x, x, x, implementation="cudnn").sum(), policy)
        made = jax.make_jaxpr(jax.value_and_grad(layer))(x)
        needed, _ = dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))
        assert str(needed).count("= dot_product_attention_fwd") == runs


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel itself, step by step on this machine."""
    monkeypatch.setattr(module, "splash", functools.partial(splash, interpret=True))


@pytest.mark.parametrize(("T", "S", "G", "K"), [(40, 40, 4, 64), (600, 130, 2, 80)])
def test_splash_equals_pytorch_with_gradients(T, S, G, K, interpreted):
    """Lengths under, over and not a multiple of the block; a head that is padded."""
    args = inputs(T, S, G=G, K=K, B=1)
    out, *gradients = zip(ours(*args, implementation="splash"), theirs(*args))
    assert relative(*out) < 5e-7  # PyTorch's float32 is 3.7e-7 from its float64
    assert max(relative(*pair) for pair in gradients) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_splash_keeps_to_segments_as_xla_does(causal, interpreted):
    args = inputs(150, 150, G=2, K=64)
    # As prompts padded on the right, whose padding still looks at what is there.
    numbers = np.ones((2, 150), np.int32), np.arange(150) < np.array([[150], [70]])
    if not causal:  # pictures in a row, and padding that looks at itself
        numbers = (np.repeat([[1, 2, 0], [1, 1, 2]], 50, 1),) * 2
    segments = tuple(map(jnp.asarray, numbers))
    both = [ours(*args, causal=causal, segments=segments, implementation=i)
            for i in ("splash", "xla")]
    out, *gradients = zip(*both)
    assert relative(*out) < 5e-7
    assert max(relative(*pair) for pair in gradients) < 1e-6


def test_splash_is_the_same_on_a_mesh(interpreted):
    q, k, v, _ = inputs(150, 140, B=4, K=64)
    segments = np.ones((4, 150), int), np.arange(140) < np.array([[140], [9], [70], [1]])
    f = jax.jit(lambda q, k, v, *s: attention(q, k, v, segments=s, implementation="splash"))
    want = f(q, k, v, *segments)
    m = mesh.make(1, 4, 2)
    with jax.set_mesh(m):
        spec = jax.sharding.NamedSharding(m, jax.P(mesh.BATCH, None, "tensor", None))
        rows = jax.sharding.NamedSharding(m, jax.P(mesh.BATCH, None))
        out = f(*(jax.device_put(a, spec) for a in (q, k, v)),
                *(jax.device_put(a, rows) for a in segments))
    assert out.sharding.spec == spec.spec
    assert relative(out, want) < 1e-6


def test_a_layer_keeps_the_tpus_kernel_flat(interpreted):
    """Heads of 64 would be padded to 128 in memory: of a layer its input, the flat output and the
    logarithms of its sums are kept, and no more."""
    layer = remat.remat(
        lambda x, _: (attention(x, x, x, implementation="splash"), None), "attention")
    made = jax.make_jaxpr(jax.grad(lambda x: jax.lax.scan(layer, x, None, 3)[0].sum()))(
        jnp.zeros((1, 40, 2, 64)))
    forwards = next(e for e in made.eqns if e.primitive.name == "scan")
    kept = [out.aval.shape for out in forwards.outvars[forwards.params["num_carry"]:]]
    assert sorted(kept) == [(3, 1, 2, 128), (3, 1, 40, 2, 64), (3, 1, 40, 128)]
