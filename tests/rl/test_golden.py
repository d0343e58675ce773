"""Three updates on one rollout, as the public PyTorch code makes them on the tiny checkpoint."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
from conftest import last, relative

from unipic_jax.core import params
from unipic_jax.flow import schedule
from unipic_jax.models import mmdit
from unipic_jax.rl import learn, rollout
from unipic_jax.rl.objective import Grpo

SIGMAS = schedule.sigmas(schedule.Config(1000, 3.0), 10)
SAMPLING = rollout.Config(guidance_scale=3.5)
RATE = 1e-4


@pytest.fixture(scope="module")
def updates(golden, kontext):
    """(metrics of three updates, velocity after them at the first state)."""
    cfg, weights = kontext["transformer"]
    trained, buffers = params.split_buffers(mmdit.specs(cfg), weights)

    def reference(frozen, condition, x, sigma):
        timestep = jnp.broadcast_to(sigma * 1000, x.shape[:1])
        return mmdit.apply(cfg, frozen["initial"], x, timestep, **condition)

    def policy(weights, frozen, condition, x, sigma):
        whole = params.union(weights, frozen["buffers"])
        return reference({"initial": whole}, condition, x, sigma)

    B = 3
    positive, negative = (
        {"context": np.repeat(golden[f"grpo/{sign}context"], B, 0),
         "pooled": np.repeat(golden[f"grpo/{sign}pooled"], B, 0)} for sign in ("", "negative_"))
    batch = {"positive": positive, "negative": negative, "group": np.zeros(B, np.int32),
             "id": np.arange(B, dtype=np.int32)}
    states = np.moveaxis(golden["grpo/trajectory"], 2, -1)  # [10, B, h, w, C]
    trajectory = rollout.Trajectory(
        jnp.asarray(states.swapaxes(0, 1)), jnp.asarray(golden["grpo/log_prob"].T),
        jnp.asarray(states[-1]), jnp.int32(0))
    how = learn.Config(Grpo(1e-4, 1e-4, kl=0.04), passes=3, ema=0.0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(RATE, 0.9, 0.999, 1e-8, weight_decay=1e-4))
    run = learn.make_learn(how, SAMPLING, SIGMAS, policy, reference, optimizer, lambda _: RATE)
    velocity = rollout.guided(policy, SAMPLING)

    def updated(trained, frozen, batch, trajectory, advantage):
        state = learn.new(how, trained, optimizer)
        state, report = run(state, frozen, batch, trajectory, advantage, jax.random.key(0))
        return report, [velocity(w, frozen, batch, trajectory.x[:, 0], SIGMAS[0])
                        for w in (trained, state.params)]

    return jax.jit(updated, compiler_options=micro.QUICK)(
        trained, {"initial": weights, "buffers": buffers}, batch, trajectory,
        jnp.asarray(golden["grpo/advantage"]))


def test_updates_equal_the_recorded_ones(updates, golden):
    """A log-probability near 1 is known to 1e-7 in float32, here and there. The loss is a mean of
    27 of their differences, each times an advantage of about 1, so it is known to about 3e-8
    (0.1 % of what it is after the first update); three times that is allowed. Gradients and
    velocities have no such cancellation. Adam's first step, of one size in every weight, makes
    the whole change of the velocity known to 2e-5 of itself."""
    report, (before, after) = jax.device_get(updates)
    losses, norms = golden["grpo/loss_and_grad_norm"].T
    ratios = np.stack([golden[f"grpo/ratio/{i}"] for i in range(3)]).reshape(3, -1)
    assert np.abs(report["loss"] - losses).max() < 1e-7
    np.testing.assert_allclose(report["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(report["ratio"], ratios.mean(1), rtol=0, atol=5e-7)
    largest = np.abs(np.log(ratios.astype(np.float64))).max(1)
    np.testing.assert_allclose(report["log_ratio_max"], largest, rtol=0, atol=1e-6)
    np.testing.assert_allclose(report["clip_above"], (ratios > 1 + 1e-4).mean(1), rtol=1e-6)
    np.testing.assert_allclose(report["clip_below"], (ratios < 1 - 1e-4).mean(1), rtol=1e-6)
    np.testing.assert_allclose(
        report["approx_kl"], 0.5 * np.square(np.log(ratios.astype(np.float64))).mean(1), rtol=2e-4)
    assert report["mismatch_max"].max() < 2e-6  # to the recorded log-probabilities
    want = [last(golden[f"grpo/velocity_{n}"]) for n in ("before", "after")]
    assert relative(before, want[0]) < 1e-5
    assert relative(after, want[1]) < 1e-5
    assert relative(after - before, want[1] - want[0]) < 1e-4
    assert report["skipped"] == 0
