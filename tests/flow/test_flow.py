"""Schedule, sampler and guidance against the goldens, diffusers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from unipic_jax.core.errors import InputError
from unipic_jax.flow import guidance, schedule
from unipic_jax.flow.loss import velocity_loss
from unipic_jax.flow.sample import sample

CFG = schedule.Config(1000, 3.0)


@pytest.mark.parametrize("steps", [4, 10, 28, 50])
def test_sigmas_equal_golden(steps, golden):
    sigmas = schedule.sigmas(CFG, steps)
    assert np.abs(sigmas - golden[f"scheduler/{steps}/sigmas"]).max() < 1e-6
    assert np.abs(1000 * sigmas[:-1] / golden[f"scheduler/{steps}/timesteps"] - 1).max() < 1e-6


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (7, 1.0), (20, 6.0)])
def test_sigmas_equal_diffusers(steps, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    ours = schedule.sigmas(schedule.Config(1000, shift), steps)
    assert np.abs(ours - theirs.sigmas.numpy()).max() < 1e-6


@pytest.mark.parametrize(("key", "value"), [
    ("use_dynamic_shifting", True), ("use_karras_sigmas", True), ("shift_terminal", 0.1)])
def test_other_schedules_are_refused_by_name(key, value):
    with pytest.raises(InputError, match=f"x.json: {key} = "):
        schedule.Config.from_json({"shift": 3.0, key: value}, "x.json")


def test_sample_solves_a_linear_flow():
    """dx/dsigma = a x by Euler is the product of (1 + a dsigma); in pieces, the same."""
    sigmas = schedule.sigmas(CFG, 12)
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    want = np.asarray(x) * np.prod(1 + 0.7 * np.diff(sigmas.astype(np.float64)))

    def velocity(x, sigma, index):
        return 0.7 * x

    whole = sample(velocity, x, sigmas)
    np.testing.assert_allclose(whole, want, rtol=1e-6)
    pieces = x
    for i in range(12):
        pieces = sample(velocity, pieces, sigmas[i:i + 2], i)
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)


def test_sample_tells_level_and_index():
    sigmas = jnp.array([1.0, 0.6, 0.5, 0.0])
    x = sample(lambda x, sigma, i: sigma + 10.0 * i, jnp.zeros(1), sigmas, first=4)
    want = -0.4 * (1 + 40) - 0.1 * (0.6 + 50) - 0.5 * (0.5 + 60)
    np.testing.assert_allclose(x[0], want, rtol=1e-6)


def network(x, sigma, condition):
    return sigma * x + condition["a"]


POSITIVE, NEGATIVE = {"a": jnp.full((2, 3), 2.0)}, {"a": jnp.full((2, 3), 0.5)}


def test_guidance_order_and_formula():
    """The batch is [negative, positive]; the result is n + s (p - n)."""
    seen = []

    def f(x, sigma, condition):
        seen.append(np.asarray(condition["a"][:, 0]))
        return network(x, sigma, condition)

    x = jnp.ones((2, 3))
    v = guidance.classifier_free(f, POSITIVE, NEGATIVE, 3.5)(x, 0.25, 0)
    np.testing.assert_allclose(v, 0.25 + 0.5 + 3.5 * 1.5)
    np.testing.assert_array_equal(seen[0], [0.5, 0.5, 2.0, 2.0])
    np.testing.assert_allclose(guidance.conditional(f, POSITIVE)(x, 0.25, 0), 2.25)


def test_three_way_guidance_formula():
    """b + s_I (n - b) + s_T (p - n), where the blank condition has fewer entries."""
    def f(x, sigma, condition):
        return network(x, sigma, condition) + condition.get("picture", 0)

    x, picture = jnp.ones((2, 3)), {"picture": jnp.full((2, 3), 4.0)}
    v = guidance.three_way(f, POSITIVE | picture, NEGATIVE | picture, NEGATIVE, 3.5, 1.5)
    np.testing.assert_allclose(v(x, 0.25, 0), 0.25 + 0.5 + 1.5 * 4 + 3.5 * 1.5)


def test_skip_layer_guidance_acts_in_its_window():
    def skipping(x, sigma, condition):
        return network(x, sigma, condition) - 1

    skip = guidance.SkipLayer((7, 8, 9))
    v = jax.jit(guidance.skip_layer(network, skipping, POSITIVE, NEGATIVE, 3.5, skip, steps=50))
    x = jnp.ones((2, 3))
    plain = 0.25 + 0.5 + 3.5 * 1.5
    got = [float(v(x, 0.25, i)[0, 0] - plain) for i in range(50)]
    np.testing.assert_allclose(got, [2.8 if 0.5 < i < 10 else 0.0 for i in range(50)], atol=1e-5)


def test_velocity_loss_is_zero_at_the_answer_and_exact_elsewhere():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    sigma = jnp.array([0.1, 0.5, 0.9])
    s = sigma.reshape(3, 1, 1)

    def truth(x, sigma):
        np.testing.assert_allclose(x, (1 - s) * x0 + s * noise, rtol=1e-6)
        return noise - x0

    np.testing.assert_array_equal(velocity_loss(truth, x0, noise, sigma), 0)
    off = velocity_loss(lambda x, sigma: (noise - x0 + 0.5).astype(jnp.float32), x0, noise, sigma)
    assert off.shape == (3,)
    np.testing.assert_allclose(off, 0.25, rtol=1e-5)
