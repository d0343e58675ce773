"""Stochastic steps against the goldens, scipy, the published tables and exact Gaussians. Tests are
named after the rows of the list of invariants that they belong to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax

from unipic_jax.core.errors import InputError
from unipic_jax.flow import schedule, transition

CFG = schedule.Config(1000, 3.0)
LEVEL = {"sde": 0.7, "cps": 0.8}  # of the goldens
KINDS = [pytest.param(k, id=k) for k in LEVEL]
GRID = (1.00000, .96013, .91335, .85769, .79037, .70728, .60215, .46488, .27805, .00893, 0)
# Steps of 10 at level 0.7: cx, cv, s, and the divergence a mean squared difference of velocities.
TABLE = np.array([
    (.7550, -.0399, .7000, 6e-5), (.7125, -.0582, .7430, 1.4e-4), (.8426, -.0693, .5362, 4.6e-4),
    (.8841, -.0838, .4459, 1.2e-3), (.9029, -.1034, .3918, 2.9e-3), (.9120, -.1309, .3528, 7.2e-3),
    (.9155, -.1709, .3191, 2.0e-2), (.9145, -.2326, .2820, 6.4e-2), (.9087, -.3351, .2254, 3.0e-1),
    (.9978, -.0111, .0063, 1.4e-2)])


def steps(kind, noise=None, n=10):
    return transition.make(kind, schedule.sigmas(CFG, n), LEVEL[kind] if noise is None else noise)


def at(all_steps, i):
    return jax.tree.map(lambda a: a[i], all_steps)


@pytest.mark.parametrize("n", [6, 10, 20, 28, 40, 50])
def test_row_01_grid(n):
    sigmas = schedule.sigmas(CFG, n)
    linear = np.linspace(1, 3e-3 / (1 + 2e-3), n)
    assert np.abs(sigmas[:-1] - 3 * linear / (1 + 2 * linear)).max() < 1e-6
    assert abs(sigmas[-2] - 0.008929) < 1e-6
    if n == 10:
        assert np.abs(sigmas - GRID).max() < 6e-6  # five digits are printed


def test_coefficients_equal_the_published_table():
    found = steps("sde")
    for column, name in enumerate(("cx", "cv", "s")):
        np.testing.assert_allclose(getattr(found, name), TABLE[:, column], atol=6e-5)
    np.testing.assert_allclose(found.divergence, TABLE[:, 3], rtol=0.08)  # of one or two digits
    influence = [.073, .125, .175, .218, .250, .260, .234, .153, .005]
    cps = steps("cps")
    np.testing.assert_allclose((2 * cps.s * np.abs(cps.cv))[:9], influence, atol=6e-4)


@pytest.mark.parametrize("i", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_row_02_03_mean_and_log_prob_equal_golden(kind, i, golden):
    x, v, noise, following = (golden[f"{kind}/{i}/{n}"]
                              for n in ("sample", "velocity", "noise", "prev"))
    step = at(steps(kind), i)
    std = step.s if kind == "cps" else step.s / np.sqrt(-step.dt)
    # The reference's float32 loses a digit and a half in 1 - sigma near pure noise, and the noise,
    # up to 4, is multiplied with that.
    np.testing.assert_allclose(std, golden[f"{kind}/{i}/std"].max(), rtol=1e-6, atol=1e-9)
    assert np.abs(transition.mean(step, x, v) - golden[f"{kind}/{i}/mean"]).max() < 2e-6
    assert np.abs(transition.advance(step, x, v, noise) - following).max() < 4e-6
    found = transition.log_prob(step, x, v, following)
    assert found.dtype == jnp.float32
    assert np.abs(found - golden[f"{kind}/{i}/log_prob"]).max() < 2e-6


@pytest.mark.parametrize("i", range(9))
def test_row_03_log_prob_equals_scipy(i):
    x, v, noise = np.random.default_rng(i).normal(size=(3, 4, 8, 8, 16)).astype(np.float32)
    step = at(steps("sde"), i)
    following = np.asarray(transition.advance(step, x, v, noise))
    sigmas = schedule.sigmas(CFG, 10).astype(np.float64)
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    std = 0.7 * np.sqrt(sigma / (1 - (sigmas[1] if i == 0 else sigma)))
    score = -(x + (1 - sigma) * v.astype(np.float64)) / sigma
    mean = x + (v - std**2 / 2 * score) * dt
    want = scipy.stats.norm.logpdf(following, mean, std * np.sqrt(-dt)).mean((1, 2, 3))
    assert np.abs(transition.log_prob(step, x, v, following) - want).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_row_04_no_noise_is_euler(kind):
    x, v, noise = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 8)).astype(np.float32)
    sigmas, all_steps = schedule.sigmas(CFG, 10), steps(kind, noise=0.0)
    for i in range(10):
        step = at(all_steps, i)
        euler = x + (sigmas[i + 1] - sigmas[i]) * v
        following = transition.advance(step, x, v, noise)
        assert np.abs(following - euler).max() < 1e-6
        value, slope = jax.value_and_grad(
            lambda v, step=step, after=following: transition.log_prob(step, x, v, after).sum())(v)
        assert value == 0
        assert not slope.any()


@pytest.mark.parametrize("n", [5, 10, 40])
def test_row_05_first_step_noise(n):
    for noise in (0.3, 0.7, 1.2):
        assert abs(steps("sde", noise, n).s[0] - noise) < 1e-6


# Data N(M, sd^2), whose velocity is linear in x: means and deviations by recursion, in float64.

M = 0.8


def linear_velocity(sigma, sd):
    """slope and offset of E[noise - x0 | x] for x = (1 - sigma) x0 + sigma noise."""
    variance = (1 - sigma)**2 * sd**2 + sigma**2
    slope = (sigma - (1 - sigma) * sd**2) / variance
    return slope, -M - slope * (1 - sigma) * M


def recursion(all_steps, sd):
    mean, variance = 0.0, 1.0
    for i in range(len(all_steps.sigma)):
        sigma, _, cx, cv, s, *_ = (np.float64(a[i]) for a in all_steps)
        slope, offset = linear_velocity(sigma, sd)
        mean = (cx + cv * slope) * mean + cv * offset
        variance = (cx + cv * slope)**2 * variance + s**2
    return mean, np.sqrt(variance)


def float64_steps(kind, noise, n):
    """The steps again, from the formulas of the paper and without rounding to float32."""
    sigmas = schedule.sigmas(CFG, n).astype(np.float64)
    sigma, following = sigmas[:-1], sigmas[1:]
    dt = following - sigma
    if kind == "sde":
        std = noise * np.sqrt(sigma / (1 - np.where(sigma == 1, sigmas[1], sigma)))
        drift = std**2 / (2 * sigma)
        cx, cv, s = 1 + drift * dt, (1 + drift * (1 - sigma)) * dt, std * np.sqrt(-dt)
    else:
        s = following * np.sin(noise * np.pi / 2)
        kept = np.sqrt(following**2 - s**2)
        cx, cv = 1 - following + kept, -(1 - following) * sigma + kept * (1 - sigma)
    zeros = np.zeros(n)
    return transition.Steps(sigma, dt, cx, cv, s, zeros, zeros, zeros)


SAMPLERS = {"euler": ("sde", 0.0, 10**6), "sde": ("sde", 0.7, 10**6), "cps": ("cps", 0.8, 10**6),
            "cps window": ("cps", 0.8, 3), "sde window": ("sde", 0.7, 3)}
DEVIATIONS = [  # sd, N, then as SAMPLERS
    (1.0, 10, .8176, .8854, .6736, .8138, .8843), (1.0, 40, .9551, .9764, .7630, .9549, 1.0021),
    (1.0, 640, .9972, 1.0005, .8026, .9972, 1.0403), (0.5, 10, .3592, .4210, .3077, .3587, .3887),
    (0.5, 640, .4977, .4993, .3996, .4977, .5192), (0.1, 10, .0332, .2355, .0282, .0332, .0359),
    (0.1, 640, .0979, .0987, .0781, .0979, .1021)]


def sampler(name, n, make):
    kind, noise, size = SAMPLERS[name]
    inside = np.arange(n) < size
    return jax.tree.map(lambda a, b: np.where(inside, a, b), make(kind, noise, n),
                        make("sde", 0.0, n))


@pytest.mark.parametrize("name", SAMPLERS)
def test_row_06_mean_of_marginals(name):
    """All samplers have the data's mean, up to the last level's share of it that any Euler step
    to zero removes exactly."""
    for sd in (1.0, 0.5, 0.1):
        for n in (10, 40):
            assert abs(recursion(sampler(name, n, float64_steps), sd)[0] - M) < 1e-9
            ours = sampler(name, n, lambda k, a, n: steps(k, a, n))
            assert abs(recursion(ours, sd)[0] - M) < 1e-6  # whose numbers are float32


@pytest.mark.parametrize("row", DEVIATIONS, ids=str)
def test_row_07_deviation_of_marginals(row):
    sd, n, *want = row
    found = [recursion(sampler(name, n, lambda k, a, n: steps(k, a, n)), sd)[1]
             for name in SAMPLERS]
    np.testing.assert_allclose(found, want, atol=1e-4)
    if (sd, n) == (1.0, 640):
        assert abs(found[1] - found[0]) < 0.005


@pytest.mark.parametrize("name", ["sde", "cps", "sde window"])
def test_row_08_monte_carlo_of_the_steps(name):
    B, sd = 1_000_000, 0.5
    all_steps = sampler(name, 10, lambda k, a, n: steps(k, a, n))

    @jax.jit
    def run(key):
        first, *keys = jax.random.split(key, 11)

        def body(x, now):
            step, key = now
            slope, offset = linear_velocity(step.sigma, sd)
            noise = jax.random.normal(key, x.shape)
            return transition.advance(step, x, slope * x + offset, noise), None

        return lax.scan(body, jax.random.normal(first, (B,)), (all_steps, jnp.stack(keys)))[0]

    x = np.asarray(run(jax.random.key(3)), np.float64)
    mean, deviation = recursion(all_steps, sd)
    assert abs(x.mean() - mean) < 4 * deviation / np.sqrt(B)
    assert abs(x.std() - deviation) < 4 * deviation / np.sqrt(2 * B)


def test_row_09_cps_keeps_the_coefficients():
    """x = (1 - sigma) x0 + sigma noise goes to (1 - sigma') x0 + sigma' noise: the two parts of
    the noise add to sigma'^2, and a point mass is reached exactly."""
    found = steps("cps")
    sigmas = schedule.sigmas(CFG, 10)
    sigma, following = sigmas[:-1], sigmas[1:]
    on_data = found.cx * (1 - sigma) - found.cv
    on_noise = found.cx * sigma + found.cv
    np.testing.assert_allclose(on_data, 1 - following, atol=1e-6)
    np.testing.assert_allclose(found.s**2 + on_noise**2, following**2, atol=1e-6)
    assert recursion(found, 0.0)[1] < 1e-6


def test_row_18_divergence_is_the_gaussians_times_dt():
    """KL = mean (mean - mean_ref)^2 / (2 std^2), which is |dt| times that of the two Gaussians."""
    x, v, other = np.random.default_rng(2).normal(size=(3, 2, 4, 4, 8)).astype(np.float32)
    gap = transition.velocity_gap(v, other)
    for i in range(9):
        step = at(steps("sde"), i)
        a, b = (np.asarray(transition.mean(step, x, u), np.float64) for u in (v, other))
        gaussian = np.square(a - b).mean((1, 2, 3)) / (2 * np.float64(step.s)**2)
        np.testing.assert_allclose(step.divergence * gap, gaussian * -step.dt, rtol=1e-5)
        sigma, std = step.sigma, step.s / np.sqrt(-step.dt)
        closed = 0.5 * step.dt**2 * (1 / std + std * (1 - sigma) / (2 * sigma))**2 * gap
        np.testing.assert_allclose(step.divergence * gap, closed, rtol=1e-5)


def test_what_is_out_of_range_is_refused():
    for kind, noise in (("ode", 0.5), ("sde", -0.1), ("cps", 1.1)):
        with pytest.raises(InputError):
            steps(kind, noise)
