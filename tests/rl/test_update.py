"""The update against one by hand, and what has to change nothing. Tests are named after the rows
of the list of invariants that they belong to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
import toy

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.flow import transition
from unipic_jax.rl import learn, rollout, step
from unipic_jax.rl.objective import Grpo, Nft
from unipic_jax.train import step as supervised
from unipic_jax.train.checkpoint import Checkpoints

KEY = jax.random.key(0)
TRAINED, FROZEN, BATCH = toy.make()
RATE = 0.05
SGD = optax.sgd(RATE)  # so that an update shows its gradient


@dataclasses.dataclass(frozen=True)
class Case:
    how: learn.Config
    sampling: rollout.Config


PLAIN = Case(learn.Config(Grpo(kl=0.04), ema=0.0), rollout.Config(window=3, place="random"))
PARTS = Case(learn.Config(Grpo(3e-2, 2e-2, kl=0.1, guard=True, noise_weight=True), updates=2,
                          passes=2, micro_batches=2, deviation="global", ema=0.0),
             rollout.Config(window=4, place="random", guidance_scale=2.0))
NFT = Case(learn.Config(Nft(kl=0.1, decay=0.5, warmup=0.3), ema=0.0),
           rollout.Config(window=2, noise=0.0))


@functools.cache
def functions(case, optimizer=SGD):
    """(rollout, update, whole step), jitted."""
    run = step.make_rollout(case.how, case.sampling, toy.SIGMAS, toy.policy, toy.SHAPE)
    update = step.make_update(case.how, case.sampling, toy.SIGMAS, toy.policy, toy.reference,
                              optimizer, lambda _: RATE)
    return [jax.jit(f, compiler_options=micro.QUICK)
            for f in (run, update, step.make_step(run, toy.reward, update))]


def begin(case, optimizer=SGD, trained=TRAINED):
    return learn.new(case.how, jax.tree.map(jnp.asarray, trained), optimizer)


def apart(case, state, reward=None, valid=None, batch=BATCH):
    """One step with a reward on the host: (trajectory, reward, state, metrics)."""
    run, update, _ = functions(case)
    trajectory = run(state, FROZEN, batch, KEY)
    if reward is None:
        reward = np.asarray(trajectory.latents).mean(1)
    valid = np.ones(len(reward), bool) if valid is None else valid
    return trajectory, reward, *update(state, FROZEN, batch, trajectory, reward, valid, KEY)


def close(a, b, tolerance):
    """Trees agree within a part of the largest entry of each leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def numeric_update(case, trajectory, advantage):
    """The parameters after all updates of a rollout, and the gradient of the first, in float64:
    all samples and steps of an update together, and derivatives of v by hand."""
    loss, how = case.how.objective, case.how
    weights = {k: np.asarray(a, np.float64) for k, a in TRAINED.items()}
    start, scale = int(trajectory.start), case.sampling.guidance_scale
    w = case.sampling.size
    levels = transition.make(case.sampling.kind, toy.SIGMAS, case.sampling.noise)
    numbers = [[np.float64(a[start + j]) for a in levels] for j in range(w)]
    spread = np.float64(levels.s)
    x = np.asarray(trajectory.x, np.float64)

    def scored(weights, j):
        _, _, cx, cv, _, precision, constant, _ = numbers[j]
        v = toy.by_hand(weights, FROZEN, BATCH, x[:, j], start + j, scale)
        error = x[:, j + 1] - cx * x[:, j] - cv * v
        return constant - precision * np.square(error).mean(1), v, error

    old = [scored(weights, j)[:2] for j in range(w)]
    found = []
    for r in range(how.rounds):
        rows = np.flatnonzero(
            np.arange(toy.B) % (how.updates * how.micro_batches) // how.micro_batches
            == r % how.updates)
        rows = rows[advantage[rows] != 0]
        gradient = {k: np.zeros_like(a) for k, a in weights.items()}
        for j in range(w):
            _, dt, _, cv, s, precision, _, divergence = numbers[j]
            log_prob, v, error = (a[rows] for a in scored(weights, j))
            A, old_v = advantage[rows], old[j][1][rows]
            logarithm = log_prob - old[j][0][rows]
            slope = 2 * precision * cv * error / toy.D  # of log p by v
            if loss.guard:
                logarithm = s * (logarithm + precision * cv**2 * np.square(v - old_v).mean(1))
                slope = s * (slope + 2 * precision * cv**2 * (v - old_v) / toy.D)
            ratio = np.exp(logarithm)
            stopped = ((A > 0) & (ratio > 1 + loss.clip_above)
                       | (A < 0) & (ratio < 1 - loss.clip_below))
            by_v = np.where(stopped, 0, -A * ratio)[:, None] * slope
            by_v *= 1 / -dt if loss.guard else 1
            by_v *= s / spread[:-1].mean() if loss.noise_weight else 1
            far = v - toy.by_hand(FROZEN["initial"], FROZEN, BATCH, x[:, j], start + j, scale)[rows]
            by_v += loss.kl * divergence * 2 * far / toy.D
            gradient["w"] += x[rows, j].T @ by_v / (len(rows) * w)
            gradient["rows"][start + j] += by_v.sum(0) / (len(rows) * w)
            found.append((r, ratio))
        weights = {k: a - RATE * gradient[k] for k, a in weights.items()}
        if r == 0:
            first = gradient
    ratios = [np.mean([a.mean() for q, a in found if q == r]) for r in range(how.rounds)]
    return weights, first, ratios


def normalized(reward, deviation):
    r = np.asarray(reward, np.float64).reshape(-1, toy.GROUP)
    centred = r - r.mean(1, keepdims=True)
    std = r.std(1, keepdims=True) if deviation == "group" else r.std()
    return (centred / (std + 1e-4)).ravel()


@pytest.mark.parametrize("case", [PLAIN, PARTS], ids=["plain", "parts"])
def test_row_20_21_update_equals_one_by_hand(case):
    """Micro-batches, parts, passes and steps one after the other are all of them together; with
    guidance the gradient goes through both halves."""
    trajectory, reward, after, report = apart(case, begin(case))
    weights, first, ratios = numeric_update(
        case, trajectory, normalized(reward, case.how.deviation))
    change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, after.params, TRAINED)
    want = jax.tree.map(lambda a, b: a - b, weights, TRAINED)
    close(change, want, 2e-4 if case is PARTS else 2e-5)
    norm = np.sqrt(sum(np.square(g).sum() for g in first.values()))
    np.testing.assert_allclose(report["grad_norm"][0], norm, rtol=2e-5)
    np.testing.assert_allclose(report["ratio"], ratios, atol=2e-6)
    assert report["grad_norm"].shape == (case.how.rounds,)
    assert after.step == case.how.rounds


def test_row_10_11_first_ratio_and_mismatch():
    """One update's ratio is 1 exactly, whatever the rollout's program has rounded; what the two
    programs differ by is reported."""
    trajectory, _, _, report = apart(PLAIN, begin(PLAIN))
    assert (report["ratio"] == 1).all()
    assert (report["log_ratio_max"] == 0).all()
    assert not report["clip_above"].any()
    assert not report["clip_below"].any()
    assert 0 <= report["mismatch"][0] <= report["mismatch_p99"][0] <= report["mismatch_max"][0]
    assert report["mismatch"][0] <= 1e-6
    shifted = trajectory.replace(log_prob=trajectory.log_prob + 0.5)
    reward = np.asarray(trajectory.latents).mean(1)
    _, moved = functions(PLAIN)[1](begin(PLAIN), FROZEN, BATCH, shifted, reward,
                                   np.ones(toy.B, bool), KEY)
    np.testing.assert_allclose(moved["mismatch"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(moved["loss"], report["loss"], atol=1e-7)
    several = apart(PARTS, begin(PARTS))[3]
    assert several["log_ratio_max"][0] < 3e-7
    assert several["log_ratio_max"][3] > 1e-4
    assert several["approx_kl"][3] > several["approx_kl"][0]


def test_row_23_only_the_window_has_a_gradient():
    trajectory, _, after, _ = apart(PLAIN, begin(PLAIN))
    moved = np.flatnonzero((np.asarray(after.params["rows"]) != TRAINED["rows"]).any(1))
    start = int(trajectory.start)
    np.testing.assert_array_equal(moved, range(start, start + 3))


def test_row_19_masked_samples_are_dropped_ones():
    """Two groups of four that are not valid, whatever they have earned, and a batch without
    them; the collapsed group counts for nothing either."""
    update = functions(PLAIN)[1]
    state = begin(PLAIN)
    trajectory, reward, *_ = apart(PLAIN, state)
    out = np.repeat([False, True, False, True], toy.GROUP)
    spoilt = np.where(out, np.nan, reward)
    masked, report = update(state, FROZEN, BATCH, trajectory, spoilt, ~out, KEY)
    keep = np.flatnonzero(~out)

    def kept(tree):
        return jax.tree.map(lambda a: a[keep] if np.ndim(a) else a, tree)

    fewer = kept(BATCH) | {"group": np.repeat(np.arange(2, dtype=np.int32), toy.GROUP)}
    dropped, less = update(state, FROZEN, fewer, kept(trajectory), reward[keep],
                           np.ones(len(keep), bool), KEY)
    change, want = ({k: s.params[k] - TRAINED[k] for k in TRAINED} for s in (masked, dropped))
    close(change, want, 2e-6)
    for name in ("loss", "kl", "ratio", "grad_norm", "reward", "group_std"):
        np.testing.assert_allclose(report[name], less[name], rtol=2e-6, atol=1e-9)
    assert report["valid"] == 0.5
    equal_ones = np.where(out, 0.3, reward).astype(np.float32)
    collapsed, report = update(state, FROZEN, BATCH, trajectory, equal_ones,
                               np.ones(toy.B, bool), KEY)
    close({k: collapsed.params[k] - TRAINED[k] for k in TRAINED}, want, 2e-6)
    assert report["collapsed"] == 0.5


def test_nothing_is_learned_from_a_batch_without_a_difference():
    for reward, valid in ((np.ones(toy.B), np.ones(toy.B)), (np.arange(toy.B), np.zeros(toy.B))):
        *_, after, report = apart(PLAIN, begin(PLAIN), reward.astype(np.float32),
                                  valid.astype(bool))
        equal(after.params, TRAINED)
        assert after.skipped == (not valid.any())  # without any reward it counts as skipped
        assert report["loss"] == 0 or not valid.any()


def test_row_24_fused_equals_apart():
    """With the same rewards, over three steps: to 1e-6 of the change, since XLA may fuse the two
    halves differently where it has them in one program."""
    fused = split = begin(PLAIN)
    for _ in range(3):
        fused, report = functions(PLAIN)[2](fused, FROZEN, BATCH, KEY)
        trajectory, *_ = apart(PLAIN, split)
        reward, valid = jax.jit(toy.reward)(FROZEN, BATCH, trajectory.latents)
        *_, split, other = apart(PLAIN, split, reward, valid)
        np.testing.assert_allclose(report["reward"], other["reward"], rtol=1e-6)
    close({k: fused.params[k] - TRAINED[k] for k in TRAINED},
          {k: split.params[k] - TRAINED[k] for k in TRAINED}, 1e-6)


def test_one_program_for_all_windows():
    state, starts = begin(PLAIN), set()
    run, _, whole = functions(PLAIN)
    for _ in range(6):
        starts.add(int(run(state, FROZEN, BATCH, KEY).start))
        state, _ = whole(state, FROZEN, BATCH, KEY)
    assert len(starts) > 1
    assert run._cache_size() == whole._cache_size() == 1


def test_row_25_resumed_is_the_same(tmp_path):
    """With a window, an optimizer's memory and a mean of the parameters that all go on."""
    case = Case(dataclasses.replace(PLAIN.how, ema=0.9, ema_every=2), PLAIN.sampling)
    adam = optax.adamw(1e-2)
    whole = functions(case, adam)[2]
    straight = jax.device_put(begin(case, adam), jax.devices()[0])  # as what is restored
    with Checkpoints(tmp_path, every=1, keep=1, keep_every=0) as checkpoints:
        for n in range(4):
            straight, report = whole(straight, FROZEN, BATCH, KEY)
            if n == 1:
                checkpoints.save(2, straight, {}, force=True)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), straight)
    with Checkpoints(tmp_path, every=1, keep=1, keep_every=0) as checkpoints:
        _, resumed, _ = checkpoints.restore(abstract)
    for _ in range(2):
        resumed, again = whole(resumed, FROZEN, BATCH, KEY)
    equal(resumed, straight)
    equal(again, report)
    assert whole._cache_size() == 1


def test_a_reward_that_is_not_finite_changes_only_the_counts():
    state = begin(PLAIN)
    reward = np.linspace(0, 1, toy.B).astype(np.float32)
    reward[5] = np.nan
    *_, after, report = apart(PLAIN, state, reward)
    equal(after.params, state.params)
    assert (after.step, after.skipped, after.skipped_in_row) == (1, 1, 1)
    assert (report["skipped"], report["skipped_in_row"]) == (1, 1)
    *_, after, _ = apart(PLAIN, after)
    assert (after.skipped, after.skipped_in_row) == (1, 0)


@pytest.mark.parametrize("sizes", [(2, 2, 1)])
def test_row_26_devices_change_nothing(sizes):
    """Four devices and one, with parts, micro-batches, guidance and anchors."""
    *_, alone, one = apart(PARTS, begin(PARTS))
    mesh = meshes.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda a: jax.device_put(a, meshes.batch_sharding(mesh, a.ndim)), BATCH)
        state, frozen = jax.device_put((begin(PARTS), FROZEN), jax.NamedSharding(mesh, jax.P()))
        after, many = functions(PARTS)[2](state, frozen, spread, KEY)
    close({k: after.params[k] - TRAINED[k] for k in TRAINED},
          {k: alone.params[k] - TRAINED[k] for k in TRAINED}, 1e-4)
    for name in ("loss", "kl", "reward", "grad_norm"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


def skipping(case, **changes):
    """A case with and without."""
    return [Case(dataclasses.replace(case.how, skip_equal=skip, **changes), case.sampling)
            for skip in (False, True)]


def half_taught():
    """Rewards that are equal in the second and the third group, whose samples are in every
    micro-batch."""
    reward = np.random.default_rng(4).normal(size=toy.B).astype(np.float32)
    reward[np.isin(BATCH["group"], (1, 2))] = 1
    return reward


@pytest.mark.parametrize("case", [PARTS, NFT])
def test_to_skip_what_teaches_nothing_changes_nothing(case):
    """On one device, and on four, of which two have only such samples."""
    moved, said = [], []
    for c in skipping(case, updates=1, micro_batches=2):
        *_, state, alone = apart(c, begin(c), half_taught())
        with jax.set_mesh(mesh := meshes.make(2, 2, 1, devices=jax.devices()[:4])):
            batch = jax.tree.map(
                lambda a: jax.device_put(a, meshes.batch_sharding(mesh, a.ndim)), BATCH)
            whole = jax.NamedSharding(mesh, jax.P())
            begun, frozen = jax.device_put((begin(c), FROZEN), whole)
            run, update, _ = functions(c)
            trajectory = run(begun, frozen, batch, KEY)
            spread, many = update(begun, frozen, batch, trajectory, half_taught(),
                                  np.ones(toy.B, bool), KEY)
        moved += [state, spread]
        said += [alone, many]
    for other in moved[1:]:
        close({k: other.params[k] - TRAINED[k] for k in TRAINED},
              {k: moved[0].params[k] - TRAINED[k] for k in TRAINED}, 1e-4)
    for other in said[1:]:
        for name, figure in said[0].items():
            np.testing.assert_allclose(other[name], figure, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("updates", [1, 2])
def test_what_teaches_nothing_is_not_computed(updates, devices):
    """Half of each device's samples, in every update: pictures that are not numbers would
    otherwise reach the gradient."""
    mesh = meshes.make(devices, 1, 1, devices=jax.devices()[:devices])
    equals = np.isin(BATCH["group"], (1, 2))[:, None]
    for c, finite in zip(skipping(NFT, updates=updates, micro_batches=2), (False, True)):
        run, update, _ = functions(c)
        with jax.set_mesh(mesh):
            batch = jax.tree.map(
                lambda a: jax.device_put(a, meshes.batch_sharding(mesh, a.ndim)), BATCH)
            state, frozen = jax.device_put((begin(c), FROZEN), jax.NamedSharding(mesh, jax.P()))
            trajectory = run(state, frozen, batch, KEY)
            broken = jnp.where(equals, jnp.nan, trajectory.latents)
            after, _ = update(state, frozen, batch, trajectory.replace(latents=broken),
                              half_taught(), np.ones(toy.B, bool), KEY)
        assert (after.skipped == 0) == finite


@pytest.mark.parametrize(("n", "decay"), [(0, 0.1), (7, 8 / 17), (15, 0.64), (100, 0.9)])
def test_row_27_mean_of_what_trains(n, decay):
    """min((1 + n) / (10 + n), 0.9), taken once after every eighth update."""
    now = learn.new(learn.Config(), {"w": jnp.zeros(2)}, optax.sgd(1.0))
    now = now.replace(step=jnp.int32(n))
    gradient = {"w": jnp.array([-1.0, 2.0])}
    for every in (1, 8):
        after, _ = supervised.advance(now, gradient, jnp.float32(0), optax.sgd(1.0), ema=0.9,
                                      ema_every=every)
        share = 1 - decay if (n + 1) % every == 0 else 0.0
        np.testing.assert_allclose(after.ema["w"], share * np.array([1.0, -2.0]), rtol=1e-6)


def test_nft_samples_with_the_slow_copy():
    """old <- eta old + (1 - eta) new, eta growing to its largest; the rollout is Euler's, with
    the slow copy, and its noise is not the training's."""
    run, _, whole = functions(NFT)
    state = begin(NFT)
    old = state.old
    for n in range(3):
        trajectory = run(state, FROZEN, BATCH, KEY)
        moved = state.replace(params=jax.tree.map(lambda a: a + 1, state.params))
        equal(run(moved, FROZEN, BATCH, KEY), trajectory)
        state, report = whole(state, FROZEN, BATCH, KEY)
        eta = min(0.5, 0.3 * n)
        old = jax.tree.map(lambda o, p, eta=eta: eta * o + (1 - eta) * p, old, state.params)
        close(state.old, old, 1e-6)
        assert np.isfinite(report["loss"]).all()
    assert np.any(state.old["w"] != state.params["w"])


def test_kept_prompts_hold_the_policy_to_the_reference():
    """Where the reward teaches nothing the update is that of the divergence on kept prompts alone,
    by hand for a reference whose rows differ: v - v_ref is that of the one row trained at."""
    index, weight = 4, 3.0
    case = Case(learn.Config(Nft(kl=0.0), keep=weight, ema=0.0),
                rollout.Config(noise=0.0, window=1, span=(index, index + 1)))
    away = np.random.default_rng(1).normal(size=TRAINED["rows"].shape).astype(np.float32)
    frozen = FROZEN | {"initial": TRAINED | {"rows": TRAINED["rows"] - away}}
    kept = {"positive": {"c": BATCH["positive"]["c"][:6], "reference": np.ones((6, toy.D), "f4")},
            "negative": {"c": BATCH["negative"]["c"][:6]}, "id": np.arange(6, dtype=np.int32)}
    run, update, _ = functions(case)
    state = begin(case)
    trajectory = run(state, frozen, BATCH, KEY)
    after, report = update(state, frozen, BATCH | {"kept": kept}, trajectory,
                           np.ones(toy.B, np.float32), np.ones(toy.B, bool), KEY)
    expected = np.array(TRAINED["rows"])
    expected[index] -= RATE * weight * 2 * away[index] / toy.D
    close(after.params["rows"], expected, 1e-6)
    assert np.any(after.params["w"] != TRAINED["w"])
    np.testing.assert_allclose(report["kept_kl"], [np.square(away[index]).mean()], rtol=1e-5)


def test_settings_that_do_not_fit_are_refused():
    def make(how, sampling=rollout.Config(), reference=toy.reference):
        step.make_update(how, sampling, toy.SIGMAS, toy.policy, reference, SGD, lambda _: RATE)

    with pytest.raises(InputError, match="no reference"):
        make(learn.Config(Grpo(kl=0.1)), reference=None)
    with pytest.raises(InputError, match="no reference"):
        make(learn.Config(Grpo(kl=0.0), keep=0.1), reference=None)
    with pytest.raises(InputError, match="without guidance"):
        make(learn.Config(Nft()), rollout.Config(guidance_scale=2.0))
    with pytest.raises(InputError, match="deviation"):
        make(learn.Config(deviation="local"))
    with pytest.raises(InputError, match="at least 1"):
        learn.Config(updates=0)


# Learning.

@functools.cache
def rise(kl, rate):
    """By how many standard errors the mean reward of 10 steps after 40 is above that of the policy
    that they began from, on the same conditions and noise."""
    case = Case(learn.Config(Grpo(kl=kl), ema=0.0), rollout.Config())
    optimizer = optax.adam(rate)
    run, _, whole = functions(case, optimizer)
    state = untrained = begin(case, optimizer, FROZEN["initial"])
    draw, rewards = np.random.default_rng(0), []
    for n in range(50):
        c = draw.normal(size=(toy.B // toy.GROUP, 3)).astype(np.float32)
        batch = BATCH | {"positive": {"c": np.repeat(c, toy.GROUP, 0)}}
        if n >= 40:
            rewards.append([np.asarray(run(s, FROZEN, batch, KEY).latents).mean(1)
                            for s in (state, untrained.replace(step=state.step))])
        state, _ = whole(state, FROZEN, batch, KEY)
    after, before = np.array(rewards).swapaxes(0, 1).reshape(2, -1)
    return (after.mean() - before.mean()) / np.sqrt((after.var() + before.var()) / len(after))


def test_row_29_it_learns():
    assert rise(0.0, 0.1) > 5


def test_row_29_a_large_divergence_weight_holds_it():
    assert abs(rise(1e4, 0.02)) < 1


def test_row_29_without_noise_it_does_not_learn():
    """The gradient is nothing, exactly."""
    case = Case(learn.Config(Grpo(kl=0.0), ema=0.0), rollout.Config(noise=0.0))
    state = begin(case)
    trajectory = functions(case)[0](state, FROZEN, BATCH, KEY)
    reward = np.asarray(trajectory.latents).mean(1)
    after, report = functions(case)[1](state, FROZEN, BATCH, trajectory, reward,
                                       np.ones(toy.B, bool), KEY)
    equal(after.params, TRAINED)
    assert report["grad_norm"] == 0
    assert report["reward_std"] > 0.01
