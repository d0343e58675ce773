"""The rollout against a loop by hand: its window, its noise and what it keeps. Tests are named
after the rows of the list of invariants that they belong to."""

import functools

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import toy

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.flow import transition
from unipic_jax.rl import rollout

KEY = jax.random.key(3)
TRAINED, FROZEN, BATCH = toy.make()


@functools.cache
def jitted(cfg):
    return jax.jit(rollout.make_rollout(cfg, toy.SIGMAS, toy.policy, toy.SHAPE),
                   compiler_options=micro.QUICK)


def by_hand(cfg, start):
    """(states [B, N + 1, D], log-probabilities [B, N]) in float64, a step at a time."""
    first, noises, _ = jax.random.split(KEY, 3)
    steps, euler = (transition.make(cfg.kind, toy.SIGMAS, a) for a in (cfg.noise, 0.0))
    states = [np.asarray(draws(first, BATCH["id"]), np.float64)]
    log_probs = []
    for i in range(toy.N):
        inside = start <= i < start + cfg.size
        _, _, cx, cv, s, precision, constant, _ = (
            np.float64(a[i]) for a in (steps if inside else euler))
        v = toy.by_hand(TRAINED, FROZEN, BATCH, states[-1], i, cfg.guidance_scale)
        noise = np.asarray(draws(jax.random.fold_in(noises, i), BATCH["id"]), np.float64)
        noise *= inside
        states.append(cx * states[-1] + cv * v + s * noise)
        log_probs.append(constant - precision * np.square(s * noise).mean(-1))
    return np.stack(states, 1), np.stack(log_probs, 1)


@jax.jit
def draws(key, ids):
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), toy.SHAPE))(ids)


def check(found, cfg, start):
    states, log_probs = by_hand(cfg, start)
    assert found.start == start
    window = slice(start, start + cfg.size)
    np.testing.assert_allclose(found.x, states[:, start:start + cfg.size + 1], atol=2e-5)
    np.testing.assert_allclose(found.latents, states[:, -1], atol=2e-5)
    np.testing.assert_allclose(found.log_prob, log_probs[:, window], atol=2e-5)
    assert np.asarray(found.x).std() > 0.1


@pytest.mark.parametrize("kind", transition.KINDS)
def test_row_23_all_steps_but_the_last(kind):
    cfg = rollout.Config(kind=kind)
    found = jitted(cfg)(TRAINED, FROZEN, BATCH, KEY, 0)
    assert found.x.shape == (toy.B, 10, toy.D)
    check(found, cfg, 0)
    assert rollout.Config(kind=kind, window=9).size == cfg.size


def test_row_23_other_steps_are_deterministic_wherever_the_window_is():
    """One program for all windows; what it keeps are the window's states."""
    cfg = rollout.Config(window=3, place="moving", every=2, span=(1, 9), guidance_scale=2.5)
    run = jitted(cfg)
    starts = [int(run(TRAINED, FROZEN, BATCH, KEY, i).start) for i in range(0, 26, 2)]
    assert starts == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1]
    for iteration in (0, 5, 11):
        check(run(TRAINED, FROZEN, BATCH, KEY, iteration), cfg, 1 + iteration // 2)
    assert run._cache_size() == 1


def test_a_random_window_is_anywhere_in_its_span():
    cfg = rollout.Config(window=2, place="random", span=(0, 5))
    starts = [int(rollout.window_start(cfg, jax.random.key(k), 0)) for k in range(60)]
    assert set(starts) == {0, 1, 2, 3}
    fixed = rollout.Config(window=2, span=(4, 9))
    assert int(rollout.window_start(fixed, KEY, 99)) == 4


def test_noise_depends_on_the_id_alone():
    """Parts of a batch are what the whole is, in any order; another key draws everything anew."""
    cfg = rollout.Config(window=3, place="moving", every=2, span=(1, 9), guidance_scale=2.5)
    whole = jitted(cfg)(TRAINED, FROZEN, BATCH, KEY, 4)
    order = np.random.default_rng(0).permutation(toy.B)
    halves = [jax.tree.map(lambda a, rows=rows: a[rows], BATCH)
              for rows in (order[:8], order[8:])]
    found = rollout.concatenate([jitted(cfg)(TRAINED, FROZEN, b, KEY, 4) for b in halves])
    np.testing.assert_allclose(found.x, whole.x[order], atol=1e-5)
    np.testing.assert_allclose(found.latents, whole.latents[order], atol=1e-5)
    np.testing.assert_allclose(found.log_prob, whole.log_prob[order], atol=1e-5)
    assert found.start == whole.start
    other = jitted(cfg)(TRAINED, FROZEN, BATCH, jax.random.key(4), 4)
    assert (np.abs(other.x - whole.x).max((0, 2)) > 0.1).all()


def test_noise_of_samples_steps_and_the_beginning_is_independent():
    ids = jnp.arange(2000)
    first, noises, _ = jax.random.split(KEY, 3)
    drawn = np.stack([rollout.normal(k, ids, (2,)) for k in (
        first, jax.random.fold_in(noises, 0), jax.random.fold_in(noises, 1))]).reshape(3, -1)
    together = np.corrcoef(np.concatenate([drawn, np.roll(drawn, 2, 1)]))
    off = together[~np.eye(6, dtype=bool)]
    assert np.abs(off).max() < 4.5 / np.sqrt(4000)
    assert abs(drawn.std() - 1) < 0.03


def test_row_21_guidance_of_one_is_none():
    """And needs no negative conditions."""
    bare = {k: v for k, v in BATCH.items() if k != "negative"}
    found = jitted(rollout.Config(guidance_scale=1.0))(TRAINED, FROZEN, bare, KEY, 0)
    check(found, rollout.Config(), 0)
    jaxpr = str(jax.make_jaxpr(rollout.guided(toy.policy, rollout.Config()))(
        TRAINED, FROZEN, bare, np.zeros((toy.B, toy.D), np.float32), 0.5))
    assert "concatenate" not in jaxpr  # one batch and not two


def test_row_26_devices_change_nothing():
    cfg = rollout.Config(window=3, place="moving", every=2, span=(1, 9), guidance_scale=2.5)
    alone = jitted(cfg)(TRAINED, FROZEN, BATCH, KEY, 2)
    mesh = meshes.make(2, 4, 1)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda a: jax.device_put(a, meshes.batch_sharding(mesh, a.ndim)), BATCH)
        whole = jax.device_put((TRAINED, FROZEN), jax.NamedSharding(mesh, jax.P()))
        found = jitted(cfg)(*whole, spread, KEY, 2)
        assert found.x.sharding.spec[0] == meshes.BATCH
    for name in ("x", "latents", "log_prob"):
        a, b = np.asarray(getattr(found, name)), np.asarray(getattr(alone, name))
        assert np.sqrt(np.square(a - b).mean()) <= 1e-5, name


@pytest.mark.parametrize(("changes", "what"), [
    ({"place": "anywhere"}, "choose from"), ({"window": 10}, "does not fit"),
    ({"window": 3, "span": (7, 9)}, "does not fit"), ({"span": (0, 10)}, "does not fit")])
def test_a_window_that_does_not_fit_is_refused(changes, what):
    with pytest.raises(InputError, match=what):
        rollout.Config(**changes)


def test_levels_and_steps_have_to_agree():
    with pytest.raises(InputError, match="10 levels are given for 8 steps"):
        rollout.make_rollout(rollout.Config(steps=8), toy.SIGMAS, toy.policy, toy.SHAPE)
