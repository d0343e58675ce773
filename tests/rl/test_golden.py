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
    report, (before, after) = jax.device_get(updates)
    for k in sorted(report):
        print(k, report[k])
    print(golden["grpo/loss_and_grad_norm"])
    want = [np.asarray(golden[f"grpo/velocity_{n}"]) for n in ("before", "after")]
    print(relative(before, last(want[0])), relative(after, last(want[1])),
          relative(after - before, last(want[1] - want[0])))
    print(np.array([golden[f"grpo/ratio/{i}"].mean() for i in range(3)]))
