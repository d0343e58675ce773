"""The transformer against the goldens and against diffusers: forwards, loss and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import first, last, relative
from flax import traverse_util

from benchmarks import reference
from unipic_jax.convert import names
from unipic_jax.core import params as pt
from unipic_jax.flow.loss import velocity_loss
from unipic_jax.models import mmdit


@pytest.mark.parametrize("case", ["t2i", "edit", "edit1"])
def test_forward_equals_golden(case, golden, kontext, mmdit_apply):
    cfg, params = kontext["transformer"]
    g = {k: golden[f"mmdit/{case}/{k}"] for k in ("timestep", "context", "pooled")}
    if case != "t2i":
        g["reference"] = last(golden[f"mmdit/{case}/ref"])
    out = mmdit_apply(cfg, params, last(golden[f"mmdit/{case}/latents"]), **g)
    assert relative(first(out), golden[f"mmdit/{case}/out"]) < 1e-5


def test_skipped_blocks_equal_golden(golden, kontext, mmdit_apply):
    cfg, params = kontext["transformer"]
    g = {k: golden[f"mmdit/edit1/{k}"] for k in ("latents", "timestep", "context", "pooled")}
    out = mmdit_apply(cfg, params, last(g["latents"]), g["timestep"], g["context"], g["pooled"],
                      skip_layers=(1, 2))
    assert relative(first(out), golden["mmdit/skip/out"]) < 1e-5


def torch_twin(cfg: mmdit.Config, params) -> torch.nn.Module:
    """diffusers' transformer with a reference, of this config and these weights."""
    twin = reference.KontextTransformer(**dataclasses.asdict(cfg), qk_norm="rms_norm")
    flat, state = traverse_util.flatten_dict(params), {}
    for rule in names.rules(mmdit, cfg):
        leaf, back = np.asarray(flat[rule.path]), names.FORMS[rule.form][1]
        for i, name in enumerate(rule.names):
            one = back(leaf[i] if rule.stacked else leaf)
            state[name] = torch.tensor(np.ascontiguousarray(one))
    twin.load_state_dict(state)
    return twin


CONFIG = dict(attention_head_dim=8, num_attention_heads=3, in_channels=4, out_channels=4,
              patch_size=2, joint_attention_dim=20, caption_projection_dim=24,
              pooled_projection_dim=10, pos_embed_max_size=16, sample_size=16)


@pytest.fixture(scope="module")
def small():
    """Layers in an order that no release has: the plain stack in two runs, the last one dual."""
    cfg = mmdit.Config(num_layers=4, dual_attention_layers=(1, 3), **CONFIG)
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    params = jax.tree.map(lambda s: 0.2 * normal(*s.shape), mmdit.specs(cfg), is_leaf=pt.is_spec)
    x = {"latents": normal(2, 6, 10, 4), "timestep": jnp.array([250.5, 900.0]),
         "context": normal(2, 7, 20), "pooled": normal(2, 10), "reference": normal(2, 6, 10, 4)}
    return cfg, params, x, torch_twin(cfg, params)


def run_twin(twin, x, **kw):
    t = {k: torch.tensor(np.asarray(v)) for k, v in x.items()}
    image = {k: t[k].movedim(-1, 1) for k in ("latents", "reference")}
    return twin(image["latents"], encoder_hidden_states=t["context"],
                ref_hidden_states=image["reference"], pooled_projections=t["pooled"],
                timestep=t["timestep"], return_dict=False, **kw)[0]


@pytest.mark.parametrize("skip", [(), (0, 2), (1, 3)])
def test_any_order_of_layers_equals_diffusers(small, skip, mmdit_apply):
    cfg, params, x, twin = small
    with torch.no_grad():
        want = run_twin(twin, x, skip_layers=list(skip))
    out = mmdit_apply(cfg, params, **x, skip_layers=skip)
    assert relative(first(out), want) < 1e-5


def test_gradients_equal_diffusers(small):
    """Of every weight and every input, with recomputation."""
    cfg, params, x, twin = small
    weights = np.random.default_rng(0).normal(size=(2, 6, 10, 4)).astype(np.float32)

    def loss(params, x):
        return jnp.sum(mmdit.apply(cfg, params, **x, remat="attention") * weights)

    grads, x_grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    leaves = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in x.items()}
    out = twin(leaves["latents"].movedim(-1, 1), encoder_hidden_states=leaves["context"],
               ref_hidden_states=leaves["reference"].movedim(-1, 1),
               pooled_projections=leaves["pooled"], timestep=leaves["timestep"],
               return_dict=False)[0]
    (out * torch.tensor(first(weights))).sum().backward()
    for name in ("latents", "reference", "context", "pooled"):
        assert relative(x_grads[name], leaves[name].grad) < 1e-4, name
    theirs = dict(twin.named_parameters())
    flat = traverse_util.flatten_dict(grads)
    for rule in names.rules(mmdit, cfg):
        back = names.FORMS[rule.form][1]
        for i, name in enumerate(rule.names):
            g = np.asarray(flat[rule.path])
            g = back(g[i] if rule.stacked else g)
            if name == "pos_embed.pos_embed":
                assert not g.any()  # a buffer: it takes no gradient
            elif np.linalg.norm(theirs[name].grad) > 1e-3:
                assert relative(g, theirs[name].grad) < 1e-4, name


def velocity(cfg, params, g):
    def f(x, sigma):
        return mmdit.apply(cfg, params, x, 1000 * sigma, g["context"], g["pooled"], last(g["ref"]))
    return f


def test_three_training_steps_equal_golden(golden, meta, kontext):
    """Loss within 1e-6 and gradients within 1e-4 of PyTorch's, then its AdamW steps."""
    cfg, params = kontext["transformer"]
    g = {k: golden[f"train/{k}"] for k in ("x0", "noise", "sigma", "context", "pooled", "ref")}

    @jax.jit
    def step(params, state):
        def loss(params):
            return velocity_loss(velocity(cfg, params, g), last(g["x0"]), last(g["noise"]),
                                 g["sigma"]).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return value, grads, optax.apply_updates(params, updates), state

    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05,
                            mask={k: k != "positions" for k in params})
    state, losses, all_grads = optimizer.init(params), [], None
    for _ in range(4):
        trained = params
        value, grads, params, state = step(params, state)
        all_grads = all_grads or traverse_util.flatten_dict(grads)
        losses.append(float(value))
    assert np.abs(np.array(losses) / golden["train/losses"] - 1).max() < 1e-6

    checked = 0
    for rule in names.rules(mmdit, cfg):
        back = names.FORMS[rule.form][1]
        for i, name in enumerate(rule.names):
            leaf = np.asarray(all_grads[rule.path])
            grad = back(leaf[i] if rule.stacked else leaf)
            if name in meta["train_grad_norms"]:
                norm = meta["train_grad_norms"][name]
                assert abs(np.linalg.norm(grad) - norm) < 1e-4 * norm + 1e-9, name
            if f"train/grad/{name}" in golden:
                assert relative(grad, golden[f"train/grad/{name}"]) < 1e-4, name
                checked += 1
    assert checked == 7

    sigma = g["sigma"].reshape(-1, 1, 1, 1)
    x = (1 - sigma) * last(g["x0"]) + sigma * last(g["noise"])
    out = jax.jit(lambda p: velocity(cfg, p, g)(x, g["sigma"]))(trained)
    # Adam's first steps are signs of gradients: elements near zero may differ.
    assert relative(first(out), golden["train/prediction_after"]) < 1e-4


def test_reference_of_another_shape_is_refused(small):
    cfg, params, x, _ = small
    with pytest.raises(ValueError, match="must have the shape"):
        mmdit.apply(cfg, params, **(x | {"reference": x["reference"][:, :4]}))
