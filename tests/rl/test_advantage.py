"""Advantages against the goldens and closed forms. Tests are named after the rows of the list of
invariants that they belong to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.rl.advantage import EPS, advantages

jitted = jax.jit(advantages, static_argnames="deviation")


def everyone(n):
    return np.ones(n, bool)


def drawn(groups=5, size=4, seed=0):
    draw = np.random.default_rng(seed)
    group = draw.permutation(np.repeat(np.arange(groups, dtype=np.int32), size))
    return draw.uniform(size=groups * size).astype(np.float32), group


@pytest.mark.parametrize(("deviation", "name"), [("group", "local_std"), ("global", "global_std")])
def test_row_16_advantages_equal_golden(deviation, name, golden):
    found, _ = jitted(golden["advantage/reward"], golden["advantage/group"].astype(np.int32),
                      everyone(8), deviation=deviation)
    assert found.dtype == jnp.float32
    assert np.abs(found - golden[f"advantage/{name}"]).max() < 2e-6


def test_row_16_means_deviations_and_order():
    reward, group = drawn()
    for deviation in ("group", "global"):
        found, report = jitted(reward, group, everyone(20), deviation=deviation)
        want = np.zeros(20)
        for g in range(5):
            own = reward[group == g].astype(np.float64)
            assert abs(found[group == g].mean()) < 1e-6
            spread = own.std() if deviation == "group" else reward.astype(np.float64).std()
            want[group == g] = (own - own.mean()) / (spread + EPS)
        np.testing.assert_allclose(found, want, atol=2e-6)
        order = np.random.default_rng(1).permutation(20)
        moved, _ = jitted(reward[order], group[order], everyone(20), deviation=deviation)
        np.testing.assert_allclose(moved, found[order], atol=1e-6)
    np.testing.assert_allclose(report["reward"], reward.mean(), rtol=1e-6)
    np.testing.assert_allclose(report["reward_std"], reward.std(), rtol=1e-6)
    inner = np.mean([reward[group == g].std() for g in range(5)])
    np.testing.assert_allclose(report["group_std"], inner, rtol=1e-6)
    assert (report["collapsed"], report["valid"]) == (0, 1)


def test_row_16_equal_rewards_have_exactly_none():
    for value in (0.1, 1 / 3, 1e-3, 77.7):
        for deviation in ("group", "global"):
            reward, group = drawn()
            reward[(group == 1) | (group == 4)] = value
            found, report = jitted(reward, group, everyone(20), deviation=deviation)
            assert (found[(group == 1) | (group == 4)] == 0).all()
            np.testing.assert_allclose(report["collapsed"], 0.4, rtol=1e-6)


def test_row_16_devices_change_nothing():
    reward, group = drawn(8, 4)
    alone, _ = jitted(reward, group, everyone(32))
    mesh = meshes.make(2, 4, 1)
    with jax.set_mesh(mesh):
        spread = [jax.device_put(a, meshes.batch_sharding(mesh, 1))
                  for a in (reward, group, everyone(32))]
        found, _ = jitted(*spread)
    np.testing.assert_array_equal(found, alone)


def test_what_is_not_valid_counts_nowhere():
    """Whatever its reward is, NaN too."""
    reward, group = drawn()
    valid = np.random.default_rng(2).uniform(size=20) > 0.3
    valid[group == 2] = [True, False, False, False]
    valid[group == 3] = False
    spoilt = np.where(valid, reward, [np.nan, np.inf, 1e9, -5] * 5).astype(np.float32)
    for deviation in ("group", "global"):
        found, report = jitted(spoilt, group, valid, deviation=deviation)
        want, less = jitted(reward[valid], group[valid], everyone(valid.sum()),
                            deviation=deviation)
        assert (found[~valid] == 0).all()
        assert (found[group == 2] == 0).all()  # one that is alone has nothing to be better than
        np.testing.assert_allclose(found[valid], want, atol=1e-6)
        for name in ("reward", "reward_std", "group_std", "collapsed"):
            np.testing.assert_allclose(report[name], less[name], rtol=1e-6)
        np.testing.assert_allclose(report["valid"], valid.mean(), rtol=1e-6)


def test_a_valid_reward_that_is_not_finite_is_not_hidden():
    reward, group = drawn()
    reward[3] = np.nan
    found, _ = jitted(reward, group, everyone(20))
    assert np.isnan(found[group == group[3]]).all()


def test_advantages_are_clipped():
    reward = np.zeros(64, np.float32)
    reward[5] = 1
    found, _ = jitted(reward, np.zeros(64, np.int32), everyone(64))
    assert found[5] == 5


@pytest.mark.parametrize("size", [4, 24])
def test_row_15_own_sample_in_the_baseline(size):
    """E[advantage * score] is (k - 1) / k of E[reward * score], which is 1 here."""
    n = 960_000
    score = np.random.default_rng(size).normal(size=n).astype(np.float32)
    group = np.arange(n, dtype=np.int32) // size
    found, report = jitted(score, group, everyone(n), deviation="global")
    centred = np.asarray(found, np.float64) * (report["reward_std"] + EPS)
    assert abs((centred * score).mean() - (size - 1) / size) < 0.005


def test_another_deviation_is_refused():
    with pytest.raises(InputError, match="choose from group, global"):
        advantages(*drawn(), everyone(20), deviation="local")
