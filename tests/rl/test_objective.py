"""Losses against derivatives by hand, limits and exact expectations. Tests are named after the
rows of the list of invariants that they belong to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unipic_jax.flow import schedule, transition
from unipic_jax.rl import objective
from unipic_jax.rl.objective import Anchor, Grpo, Nft

SIGMAS = schedule.sigmas(schedule.Config(1000, 3.0), 10)
STEPS = transition.make("sde", SIGMAS, 0.7)
B, D = 4, 6


def at(i, steps=STEPS):
    return jax.tree.map(lambda a: a[i], steps)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, FOLLOWING, CONTEXT = normal(3, B, D)
ADVANTAGE = np.array([1.5, -0.5, -1.2, 0.2], np.float32)


def velocity(w, x=X):
    return jnp.tanh(jnp.matmul(x, w)) + CONTEXT  # by the same program, be w traced or not


W = 0.3 * normal(D, D, seed=1)


def loss_of(cfg, w, old_w=None, i=5, advantage=ADVANTAGE):
    """Mean loss and figures at a step, relative to old weights or (None) to the same ones."""
    def score(w):
        v = velocity(w)
        return Anchor(transition.log_prob(at(i), X, v, FOLLOWING), v)

    now = score(w)
    old = lax.stop_gradient(now if old_w is None else score(old_w))
    each, figures = objective.grpo(cfg, at(i), objective.noise_weights(STEPS)[i], advantage,
                                   *now, None, old)
    return each.mean(), figures


def test_row_12_gradient_at_ratio_one():
    """It is that of -mean A log p."""
    def plain(w):
        return -(ADVANTAGE * transition.log_prob(at(5), X, velocity(w), FOLLOWING)).mean()

    (_, figures), slope = jax.value_and_grad(lambda w: loss_of(Grpo(), w), has_aux=True)(W)
    assert (figures["ratio"] == 1).all()
    assert not figures["clip_above"].any()
    assert not figures["clip_below"].any()
    want = jax.grad(plain)(W)
    assert np.abs(slope - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("advantage", "logarithm", "passes"), [
    (1.0, 2e-4, False), (-1.0, -2e-4, False), (1.0, -2e-4, True), (-1.0, 2e-4, True),
    (1.0, 5e-5, True), (-1.0, -5e-5, True)])
def test_row_13_clip(advantage, logarithm, passes):
    """What has gone further than the range in the wanted direction has no gradient."""
    def loss(log_prob):
        each, figures = objective.grpo(
            Grpo(1e-4, 1e-4), at(5), 1.0, jnp.float32(advantage), log_prob, jnp.zeros((1, D)),
            None, Anchor(jnp.zeros(1), None))
        return each.sum(), figures

    slope, figures = jax.grad(loss, has_aux=True)(jnp.array([logarithm], jnp.float32))
    want = -advantage * np.exp(logarithm) if passes else 0.0
    np.testing.assert_allclose(slope, want, rtol=1e-5, atol=0)
    assert figures["clip_above"] == (logarithm > 1e-4)
    assert figures["clip_below"] == (logarithm < -1e-4)
    np.testing.assert_allclose(figures["approx_kl"], 0.5 * logarithm**2, rtol=1e-5)


def test_the_sides_of_the_range_are_apart():
    def figures(logarithm):
        return objective.grpo(Grpo(2e-6, 4e-6), at(5), 1.0, jnp.float32(1),
                              jnp.array([logarithm], jnp.float32), jnp.zeros((1, D)), None,
                              Anchor(jnp.zeros(1), None))[1]

    assert figures(3e-6)["clip_above"] == 0
    assert figures(5e-6)["clip_above"] == 1
    assert figures(-3e-6)["clip_below"] == 1


def test_row_17_18_divergence():
    """From itself exactly 0 and without a gradient; else the weight times that of the step."""
    def loss(w, other):
        v = velocity(w)
        zero = jnp.zeros(B)
        each, figures = objective.grpo(Grpo(kl=0.04), at(7), 1.0, zero, zero, v, velocity(other),
                                       Anchor(zero, None))
        return each.sum(), figures

    slope, figures = jax.grad(loss, has_aux=True)(W, W)
    assert (figures["kl"] == 0).all()
    assert (slope == 0).all()
    other = W + 0.1 * normal(D, D, seed=2)
    value, figures = loss(W, other)
    step = at(7)
    means = [np.asarray(transition.mean(step, X, velocity(w)), np.float64) for w in (W, other)]
    want = np.square(means[0] - means[1]).mean(1) / (2 * np.float64(step.s)**2) * -step.dt
    np.testing.assert_allclose(figures["kl"], want, rtol=1e-5)
    np.testing.assert_allclose(value, 0.04 * want.sum(), rtol=1e-5)


def test_row_14_policy_gradient_equals_finite_differences():
    """Velocity theta x + 0.4 and reward -(x - 0.5)^2: the expected reward by a recursion of the
    Gaussian in float64, and its derivative by differences, theta being that of the trained steps
    alone; against E[reward * sum of d log p] over five million paths."""
    theta, offset, trained = -0.3, 0.4, range(9)

    def expected(other):
        mean, variance = 0.0, 1.0
        for i in range(10):
            _, _, cx, cv, s, *_ = (np.float64(a[i]) for a in STEPS)
            slope = cx + cv * (other if i in trained else theta)
            stochastic = i in trained
            if not stochastic:  # the last step is Euler's
                slope, s, cv = 1 + float(STEPS.dt[i]) * theta, 0.0, float(STEPS.dt[i])
            mean, variance = slope * mean + cv * offset, slope**2 * variance + s**2
        return -(variance + (mean - 0.5)**2)

    differences = [(expected(theta + h) - expected(theta - h)) / (2 * h) for h in (1e-4, 1e-5)]
    assert abs(differences[1] / differences[0] - 1) < 1e-6

    @jax.jit
    def estimates(key):
        """E[...] of one chunk of paths and of its square."""
        n = 500_000
        first, *keys = jax.random.split(key, 10)
        x = jax.random.normal(first, (n, 1))
        score = jnp.zeros(n)

        def body(carry, now):
            x, score = carry
            step, key = now
            following = transition.advance(step, x, theta * x + offset,
                                           jax.random.normal(key, x.shape))
            _, slope = jax.jvp(
                lambda t: transition.log_prob(step, x, t * x + offset, following),
                (jnp.float32(theta),), (jnp.float32(1),))
            return (following, score + slope), None

        steps = jax.tree.map(lambda a: a[:9], STEPS)
        (x, score), _ = lax.scan(body, (x, score), (steps, jnp.stack(keys)))
        x = x + float(STEPS.dt[9]) * (theta * x + offset)
        each = (-jnp.square(x[:, 0] - 0.5) - expected(theta)) * score  # a baseline, for the noise
        return each.mean(), jnp.square(each).mean()

    found = np.array([estimates(jax.random.key(k)) for k in range(10)], np.float64)
    mean, square = found.mean(0)
    error = np.sqrt((square - mean**2) / 5_000_000)
    assert error < 0.01 * abs(differences[1])
    assert abs(mean - differences[1]) < 3 * error


def test_row_28_guards_ratio_has_mean_one():
    """Over the old policy's noise, however far the new one is; the plain one's falls behind."""
    n, D = 40_000, 32
    x, context, noise = normal(3, n, D, seed=5)
    for i, distance in ((2, 0.5), (7, 0.05)):
        step = at(i)
        v_old = context
        v = v_old + distance
        following = transition.advance(step, x, v_old, noise)
        old = Anchor(transition.log_prob(step, x, v_old, following), v_old)
        log_prob = transition.log_prob(step, x, v, following)
        guarded, plain = (np.asarray(objective.log_ratio(cfg, step, log_prob, v, old), np.float64)
                          for cfg in (Grpo(guard=True), Grpo()))
        assert abs(guarded.mean()) < 3 * guarded.std() / np.sqrt(n)
        d = abs(step.cv) * distance / step.s
        error = plain.std() / np.sqrt(n)
        assert abs(plain.mean() + d**2 / 2) < 3 * error < 0.2 * d**2
        # Without the deviation's division: rms(dmean) N(0, 1) / sqrt(D).
        np.testing.assert_allclose(guarded.std(), d * step.s / np.sqrt(D), rtol=0.02)


def test_guards_loss_and_noise_weight():
    one = np.ones(B, np.float32)
    plain, _ = loss_of(Grpo(), W, advantage=one)
    assert plain == -1
    old = W + 1e-3 * normal(D, D, seed=3)
    _, figures = loss_of(Grpo(guard=True), W, old)
    logarithm = objective.log_ratio(
        Grpo(guard=True), at(5),
        transition.log_prob(at(5), X, velocity(W), FOLLOWING), velocity(W),
        Anchor(transition.log_prob(at(5), X, velocity(old), FOLLOWING), velocity(old)))
    np.testing.assert_allclose(figures["ratio"], np.exp(logarithm), rtol=3e-7)
    guarded, _ = loss_of(Grpo(guard=True), W, advantage=one)
    np.testing.assert_allclose(guarded, plain / -STEPS.dt[5], rtol=1e-5)
    weighted, _ = loss_of(Grpo(noise_weight=True), W, advantage=one)
    np.testing.assert_allclose(weighted, plain * STEPS.s[5] * 2.25, rtol=2e-3)  # of 3 digits
    weights = objective.noise_weights(STEPS)
    np.testing.assert_allclose(weights[:-1].mean(), 1, rtol=1e-6)


def test_no_noise_lets_no_gradient_through():
    still = transition.make("sde", SIGMAS, 0.0)
    assert (objective.noise_weights(still) == 0).all()

    def loss(w):
        v = velocity(w)
        log_prob = transition.log_prob(at(5, still), X, v, FOLLOWING)
        each, _ = objective.grpo(Grpo(), at(5, still), 1.0, ADVANTAGE, log_prob, v,
                                 velocity(W + 1), lax.stop_gradient(Anchor(log_prob, v)))
        return each.sum()

    assert (jax.grad(loss)(W) == 0).all()


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_by_hand(beta):
    x0, noise = normal(2, B, D, seed=8)
    sigma = np.array([0.2, 0.5, 0.9, 0.99], np.float32)
    s = sigma[:, None]
    x = (1 - s) * x0 + s * noise
    v, v_old, v_ref = (velocity(W + d, x) for d in (0, 0.1, 0.3))
    advantage = np.array([0.0, 2.5, -5.0, 9.0], np.float32)
    loss, figures = objective.nft(Nft(beta=beta, kl=0.3), advantage, x0, x, sigma, v, v_old, v_ref)
    share = np.array([0.5, 0.75, 0.0, 1.0])
    v, v_old, v_ref, s64 = (np.asarray(a, np.float64) for a in (v, v_old, v_ref, s))

    def distance(v):
        error = x - s64 * v - x0
        return np.square(error).mean(1) / np.abs(error).mean(1)

    want = (share * distance((1 - beta) * v_old + beta * v)
            + (1 - share) * distance((1 + beta) * v_old - beta * v))
    np.testing.assert_allclose(figures["policy_loss"], want, rtol=1e-5)
    np.testing.assert_allclose(loss, want + 0.3 * np.square(v - v_ref).mean(1), rtol=1e-5)


def test_nft_pulls_good_samples_nearer_and_pushes_bad_ones_away():
    """At the old policy the gradient of a sample is (2 r - 1) times that of a good one's."""
    x0, noise = normal(2, B, D, seed=8)
    sigma = np.full(B, 0.5, np.float32)
    x, v_old = 0.5 * x0 + 0.5 * noise, velocity(W)

    def slope(advantage):
        return jax.grad(lambda v: objective.nft(
            Nft(), jnp.full(B, advantage), x0, x, sigma, v, v_old, None)[0].sum())(v_old)

    good = slope(5.0)
    np.testing.assert_allclose(slope(0.0), 0, atol=1e-7)
    np.testing.assert_allclose(slope(-5.0), -good, rtol=1e-5)
    np.testing.assert_allclose(slope(2.5), 0.5 * good, rtol=1e-4, atol=1e-7)
    assert ((good * (v_old - (noise - x0))).sum(1) > 0).all()  # downhill is towards the answer
