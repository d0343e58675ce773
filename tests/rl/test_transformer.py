"""The whole step on a small transformer with adapters, guided, with its layers rematerialized, on
meshes. Tests are named after the rows of the list of invariants that they belong to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from unipic_jax.core import lora
from unipic_jax.core import mesh as meshes
from unipic_jax.rl import learn, rollout, step
from unipic_jax.rl.objective import Grpo

SAMPLING = rollout.Config(window=2, place="moving", every=1, guidance_scale=4.5)
HOW = learn.Config(Grpo(kl=0.04), updates=2, ema=0.0)
KEY = jax.random.key(2)


@functools.cache
def run(dtype, sizes):
    """(latents, state after, metrics) of one step from fresh adapters."""
    policy, reference = tiny.make_policy(dtype, remat="full")
    optimizer = optax.sgd(1.0)
    sample = step.make_rollout(HOW, SAMPLING, tiny.SIGMAS, policy, tiny.SHAPE)
    update = step.make_update(HOW, SAMPLING, tiny.SIGMAS, policy, reference, optimizer,
                              lambda _: 1.0)

    def whole(state, frozen, batch, key):
        trajectory = sample(state, frozen, batch, key)
        reward, valid = tiny.reward(frozen, batch, trajectory.latents)
        return trajectory.latents, *update(state, frozen, batch, trajectory, reward, valid, key)

    base = {"base": jax.tree.map(lambda a: a.astype(dtype), tiny.weights())}
    mesh = meshes.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
    with jax.set_mesh(mesh):
        trained, frozen, batch = tiny.on(mesh, tiny.adapters(), base, tiny.batch())
        state = jax.jit(functools.partial(learn.new, HOW, optimizer=optimizer))(trained)
        return jax.device_get(jax.jit(whole)(state, frozen, batch, KEY))


CASES = [(dtype, sizes) for dtype in (jnp.float32, jnp.bfloat16)
         for sizes in ((1, 1, 1), (1, 4, 2))]


@pytest.mark.parametrize(("dtype", "sizes"), CASES)
def test_row_10_11_17_of_the_first_update(dtype, sizes):
    """The anchor, recomputed by the training's function, is the training's to the bit; and a fresh
    adapter is no distance from the reference."""
    _, _, report = run(dtype, sizes)
    assert report["log_ratio_max"][0] == 0
    assert report["ratio"][0] == 1
    assert report["log_ratio_max"][1] > 0
    assert report["kl"][0] == 0
    assert report["kl"][1] > 0
    # Of the rollout's program, which is another one.
    assert report["mismatch"][0] <= (1e-6 if dtype is jnp.float32 else 5e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_row_26_one_device_and_eight(dtype):
    (a, one, _), (b, many, _) = (run(dtype, sizes) for sizes in ((1, 1, 1), (1, 4, 2)))
    assert np.sqrt(np.square(a - b).mean()) <= (1e-5 if dtype is jnp.float32 else 3e-2)
    if dtype is jnp.float32:
        start = tiny.adapters()
        changes = [jax.tree.map(lambda x, y: (x - y).ravel(), s.params, start) for s in (one, many)]
        x, y = (np.concatenate(jax.tree.leaves(c)) for c in changes)
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x)


def test_row_22_without_the_adapter_it_is_the_base():
    policy, reference = tiny.make_policy(remat="none")
    frozen, condition = {"base": tiny.weights()}, tiny.batch(2)["positive"]
    x = np.ones((2, *tiny.SHAPE), np.float32)
    base = jax.jit(reference)(frozen, condition, x, 0.5)
    fresh = jax.jit(policy)(tiny.adapters(), frozen, condition, x, 0.5)
    np.testing.assert_array_equal(fresh, base)
    moved = jax.tree.map(lambda a: a + 0.1, tiny.adapters())
    joined = jax.jit(policy)(moved, frozen, condition, x, 0.5)
    merged = {"base": lora.merge(frozen["base"], moved, tiny.SCALE)}
    np.testing.assert_allclose(joined, jax.jit(reference)(merged, condition, x, 0.5), rtol=2e-4,
                               atol=2e-5)
    assert np.abs(joined - base).max() > 1e-3
