"""The training step: draws, micro-batches, meshes, faults, averages and the optimizer."""

import functools

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
from flax import traverse_util

from unipic_jax.core import mesh as meshes
from unipic_jax.data import feed
from unipic_jax.train import loop, optimizer, stage, state
from unipic_jax.train.step import make_step

B, D = 8, 3
KEY = jax.random.key(0)


def toy(trained, frozen, batch, keys):
    """Linear regression on noisy inputs, and a parameter a row whose gradient is what was drawn."""
    drawn = jax.vmap(jax.random.normal)(keys)
    row = jnp.where(batch["row"][:, None] == jnp.arange(B), trained["rows"], 0).sum(-1)
    error = jnp.square(batch["x"] @ trained["w"] + frozen["b"] - 1).sum(-1)
    return error + drawn * row, {"sigma": batch["sigma"], "more": drawn}


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return {"row": np.arange(B, dtype=np.int32), "x": draw.normal(size=(B, D)).astype(np.float32),
            "sigma": np.array([0.1, 0.2, 0.3, 0.5, 0.5, 0.74, 0.76, 1.0], np.float32)}


def weights():
    return {"w": jnp.ones((D, 2)), "rows": jnp.zeros(B)}


FROZEN = {"b": jnp.full(2, 0.5)}


def constant(rate):
    return lambda step: jnp.float32(rate)


def toy_step(update, *, rate=1.0, **options):
    return jax.jit(make_step(toy, update, constant(rate), **options))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("sizes", [None, (1, 1, 1), (2, 1, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)])
def test_micro_batches_and_meshes_change_nothing(sizes, batch):
    """Plain descent at rate B shows the gradients; the rows' are the draws, exactly."""
    found = []
    for parts in (1, 2, 4):
        if sizes and B // parts < sizes[0] * sizes[1]:
            continue
        run = toy_step(optax.sgd(float(B)), micro_batches=parts)
        begin, here, frozen = state.new(weights(), optax.sgd(1.0), ema=False), batch, FROZEN
        if sizes:
            mesh = meshes.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
            with jax.set_mesh(mesh):
                begin, frozen = jax.device_put((begin, frozen), jax.NamedSharding(mesh, jax.P()))
                found.append(run(begin, frozen, feed.to_device(mesh, here), KEY))
        else:
            found.append(run(begin, frozen, here, KEY))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(KEY, 0), np.arange(B))
    drawn = jax.vmap(jax.random.normal)(keys)
    want = {"w": 1 - B * jax.grad(lambda w: jnp.square(
        batch["x"] @ w + FROZEN["b"] - 1).sum(-1).mean())(jnp.ones((D, 2))), "rows": -drawn}
    for now, report in found:
        np.testing.assert_array_equal(now.params["rows"], want["rows"])
        np.testing.assert_allclose(now.params["w"], want["w"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(report["more"], drawn.mean(), rtol=1e-6)
        for name, value in report.items():
            np.testing.assert_allclose(value, found[0][1][name], rtol=1e-6, atol=1e-7)


def test_each_step_draws_anew(batch):
    run = toy_step(optax.sgd(float(B)))
    first, _ = run(state.new(weights(), optax.sgd(1.0), ema=False), FROZEN, batch, KEY)
    second, _ = run(first, FROZEN, batch, KEY)
    steps = -np.stack([first.params["rows"], second.params["rows"] - first.params["rows"]])
    assert len(np.unique(steps.round(4))) == 2 * B


def test_a_step_that_is_not_finite_changes_only_the_counts(batch):
    update = optimizer.make(optimizer.Config(learning_rate=0.1), 100)
    run = toy_step(update, ema=0.9)
    now = state.new(weights(), update, ema=True)
    for _ in range(3):
        now, report = run(now, FROZEN, batch, KEY)
    assert report["skipped"] == report["skipped_in_row"] == 0
    for name, bad in (("x", np.nan), ("x", np.inf), ("x", 3e38)):  # the last one overflows
        spoilt = dict(batch, **{name: batch[name].copy()})
        spoilt[name][5, 1] = bad
        after, report = run(now, FROZEN, spoilt, KEY)
        for field in ("params", "opt", "ema"):
            equal(getattr(after, field), getattr(now, field))
        assert after.step == now.step + 1
        assert after.skipped == now.skipped + 1 == report["skipped"]
        assert after.skipped_in_row == now.skipped_in_row + 1 == report["skipped_in_row"]
        now = after
    now, report = run(now, FROZEN, batch, KEY)
    assert (now.step, now.skipped, now.skipped_in_row) == (7, 3, 0)
    assert np.any(now.params["w"] != after.params["w"])
    assert np.isfinite(report["loss"])


def test_a_gradient_that_is_not_finite_is_skipped(batch):
    def root(trained, frozen, batch, keys):  # 0 at 0, where its slope is infinite
        return jnp.sqrt(jnp.abs(trained["w"][0, 0] - 1)) * jnp.ones(B), {}

    now = state.new(weights(), optax.sgd(1.0), ema=False)
    after, report = jax.jit(make_step(root, optax.sgd(1.0), constant(1.0)))(now, {}, batch, KEY)
    assert report["loss"] == 0
    assert not np.isfinite(report["grad_norm"])
    equal(after.params, now.params)
    assert after.skipped == 1


def test_the_mean_of_the_parameters(batch):
    """A plain mean at first, then of the decay that is asked for."""
    run = toy_step(optax.sgd(0.1), ema=0.5)
    now = state.new(weights(), optax.sgd(1.0), ema=True)
    want = np.ones((D, 2))
    for step in range(12):
        now, _ = run(now, FROZEN, batch, KEY)
        decay = min(0.5, (step + 1) / (step + 10))
        want = decay * want + (1 - decay) * np.asarray(now.params["w"])
        np.testing.assert_allclose(now.ema["w"], want, rtol=1e-5)
    assert (step + 1) / (step + 10) > 0.5
    assert state.new(weights(), optax.sgd(1.0), ema=False).ema is None


def test_schedule_and_clipping():
    cfg = optimizer.Config(learning_rate=2.0, warmup=0.1, weight_decay=0.0, clip=0.5)
    rate = optimizer.schedule(cfg, 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(rate(55), 1, rtol=1e-6)  # half of the cosine
    np.testing.assert_allclose(rate(100), 0, atol=1e-6)
    np.testing.assert_allclose(rate(32.5), 2 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)
    # Adam's first two steps by hand, of a gradient of norm 5 that is clipped to 0.5.
    update = optimizer.make(cfg, 100)
    params = {"w": jnp.zeros(2)}
    memory = update.init(params)
    for step, gradient in enumerate(([3.0, -4.0], [0.0, 0.25])):
        change, memory = update.update({"w": jnp.array(gradient)}, memory, params)
        clipped = np.array(gradient) * min(1, 0.5 / np.linalg.norm(gradient))
        if step == 0:
            m, v = (1 - cfg.b1) * clipped, (1 - cfg.b2) * clipped**2
        else:
            m, v = cfg.b1 * m + (1 - cfg.b1) * clipped, cfg.b2 * v + (1 - cfg.b2) * clipped**2
        t = step + 1
        want = -rate(step) * (m / (1 - cfg.b1**t)) / (np.sqrt(v / (1 - cfg.b2**t)) + cfg.eps)
        np.testing.assert_allclose(change["w"], want, rtol=1e-5, atol=1e-9)


def test_weight_decay_is_decoupled():
    cfg = optimizer.Config(learning_rate=0.5, warmup=0.01, weight_decay=0.2)
    update = optimizer.make(cfg, 100)
    params = {"w": jnp.array([2.0, -1.0])}
    memory = update.init(params)
    _, memory = update.update({"w": jnp.zeros(2)}, memory, params)  # whose rate is 0
    change, _ = update.update({"w": jnp.zeros(2)}, memory, params)
    np.testing.assert_allclose(change["w"], [-0.5 * 0.2 * 2, 0.5 * 0.2 * 1], rtol=1e-6)


def test_muon_equals_optax():
    """Kernels of layers, of a convolution and alone; and AdamW for all else, and the head."""
    cfg = optimizer.Config(learning_rate=0.1, warmup=0.0, cosine=False, clip=1e9, muon=True)
    shapes = {"layers": {"kernel": (2, 6, 4), "bias": (2, 4)}, "conv": {"kernel": (3, 3, 2, 5)},
              "one": {"kernel": (4, 7)}, "head": {"kernel": (4, 9)}}
    into = {"layers": -2, "conv": (0, 1, 2), "one": -2}

    def matrix(path, _):
        names = [part.key for part in path]
        if names[-1] == "bias" or names[0] == "head":
            return None
        return optax.contrib.MuonDimensionNumbers(into[names[0]], -1)

    def draw(key):
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
        return tree.unflatten([jax.random.normal(jax.random.fold_in(key, i), shape)
                               for i, shape in enumerate(leaves)])

    theirs = optax.contrib.muon(
        0.1, weight_decay=cfg.weight_decay, adam_b1=cfg.b1, adam_b2=cfg.b2, consistent_rms=0.2,
        adam_weight_decay=cfg.weight_decay, nesterov=False,
        muon_weight_dimension_numbers=lambda p: jax.tree.map_with_path(matrix, p))
    ours, params = optimizer.make(cfg, 10), draw(jax.random.key(0))
    memory, momentum = ours.init(params), jax.tree.map(jnp.zeros_like, params)
    for step in range(3):
        gradient = draw(jax.random.key(step + 1))
        momentum = jax.tree.map(lambda m, g: 0.95 * m + g, momentum, gradient)
        ahead = jax.tree.map(lambda m, g: 0.95 * m + g, momentum, gradient)
        change, memory = ours.update(gradient, memory, params)
        # Of the first step the momentum is the gradient; and only its direction counts.
        want, _ = theirs.update(ahead, theirs.init(params), params)
        for name in into:
            np.testing.assert_allclose(change[name]["kernel"], want[name]["kernel"], atol=2e-5)
        if step == 0:
            np.testing.assert_allclose(change["head"]["kernel"], want["head"]["kernel"], rtol=1e-4)
            np.testing.assert_allclose(change["layers"]["bias"], want["layers"]["bias"], rtol=1e-4)


def test_losses_by_quarter(batch):
    run = toy_step(optax.sgd(0.1))
    _, report = run(state.new(weights(), optax.sgd(1.0), ema=False), FROZEN, batch, KEY)
    each = np.square(batch["x"] @ np.ones((D, 2)) - 0.5).sum(-1)
    np.testing.assert_array_equal(report["quarter_count"], [2, 1, 3, 2])
    want = [each[:2].mean(), each[2], each[3:6].mean(), each[6:].mean()]
    np.testing.assert_allclose(report["quarter_loss"], want, rtol=1e-5)
    assert "sigma" not in report


# A real stage, on meshes.

STEPS = 4


@pytest.fixture(scope="module")
def unified(micro_model):
    """The config of stage C with edits only, in which also the language model is at work."""
    config = micro.point(micro.get_config("unified"), micro_model)
    del config.data.sources["generate"]
    config.optimizer.learning_rate = 1e-3
    return config


@pytest.fixture(scope="module")
def run(unified):
    """(state before, frozen before, state after, frozen after, reports) of a short run on a
    mesh."""

    @functools.cache
    def trained(sizes):
        mesh = meshes.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
        with jax.set_mesh(mesh):
            return on(mesh)

    def on(mesh):
        here = stage.open_stage(unified)
        trained, frozen = stage.parameters(unified, here, mesh)
        timing = optimizer.Config(**unified.optimizer)
        update = optimizer.make(timing, STEPS)
        begin = jax.jit(functools.partial(state.new, optimizer=update, ema=True))(trained)
        step = jax.jit(make_step(here.loss, update, optimizer.schedule(timing, STEPS), ema=0.9),
                       compiler_options=micro.QUICK)
        data = loop.Data(unified, here, frozen, mesh)
        before, now, reports = jax.tree.map(np.asarray, frozen), begin, []
        for _, (_, arrays) in zip(range(STEPS), feed.prefetch(mesh, data.batches(0))):
            now, report = step(now, frozen, arrays, KEY)
            reports.append(jax.device_get(report))
        return begin, before, now, frozen, reports

    return trained


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 2, 2)])
def test_losses_are_the_same_on_any_mesh(sizes, run):
    *_, alone = run((1, 1, 1))
    *_, spread = run(sizes)
    for one, other in zip(alone, spread):
        np.testing.assert_array_equal(one["quarter_count"], other["quarter_count"])
        for name in ("loss", "quarter_loss", "grad_norm"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, err_msg=name)
    assert len({float(r["loss"]) for r in alone}) == STEPS


def test_what_is_frozen_does_not_change_and_has_no_memory(run):
    begin, before, now, frozen, _ = run((1, 2, 1))
    equal(frozen, before)
    assert set(now.params) == {"conditioner", "transformer"}
    assert "positions" in before["transformer"]
    assert "positions" not in now.params["transformer"]
    leaves = traverse_util.flatten_dict(now.params)
    moments = [a for a in jax.tree.leaves(now.opt) if a.ndim]
    # One of each kernel, for Muon, and two of all else.
    assert sorted(m.shape for m in moments) == sorted(
        a.shape for path, a in leaves.items() for _ in range(1 + (path[-1] != "kernel")))
    changed = [np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(
        leaves.values(), traverse_util.flatten_dict(begin.params).values())]
    assert all(changed)
