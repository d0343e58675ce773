"""Every stage of `configs/`: what trains, and that its step lowers for 256 devices at full size."""

import functools

import jax
import jax.numpy as jnp
import micro
import pytest
from conftest import ROOT
from full_size import count, edits, opened, share, split
from jax.sharding import AxisType

from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.train import optimizer, stage, state
from unipic_jax.train.step import make_step

LIMIT = 16 * 2**30  # bytes of memory on a small device, half of which the state may take


@pytest.mark.parametrize(("name", "trained"), [
    ("kontext", {"transformer"}), ("align", {"conditioner"}),
    ("unified", {"conditioner", "transformer"}),
    ("nano/autoencoder", {"vae"}), ("nano/language", {"mllm"}),
    ("nano/base", {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}),
    ("nano/kontext", {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}),
    ("nano/align", {"conditioner"}), ("nano/judge", {"mllm", "judge"}),
    ("edit_judge", {"mllm", "judge"}), ("pdtr_edit_512", {"transformer"}),
    ("pdtr_t2i_512", {"transformer"}), ("pods", {"transformer"}),
    ("nano/unified", {"conditioner", "transformer"}),
    ("nano/demo", {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}),
    ("nano/demo_rl", {"transformer"}), ("nano/rl_edit", {"transformer"}),
    ("nano/rl_generate", {"transformer"})])
def test_what_trains_and_what_is_frozen(name, trained, released):
    root = micro.NANO if name.startswith("nano") else released
    config, here = opened(name, root)
    assert set(here.trained) == trained
    mesh = jax.sharding.AbstractMesh((1, 1, 1), meshes.AXES, (AxisType.Explicit,) * 3)
    own, frozen = stage.abstract(config, here, mesh)
    assert set(own) == trained
    assert {a.dtype for a in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(frozen)} <= {jnp.dtype(config.dtype)}
    assert config.dtype == ("float32" if name.startswith("nano") else "bfloat16")
    whole = jax.eval_shape(here.combine, own, frozen)
    for part, p in here.parts.items():
        if p.has_weights and not (config.lora.rank and part in trained):
            want = params.abstract(p.specs)
            assert jax.tree.map(jnp.shape, whole[part]) == jax.tree.map(jnp.shape, want)


def test_every_config_is_tried():
    found = {str(f.relative_to(ROOT / "configs").with_suffix("")) for f in
             (ROOT / "configs").rglob("*.py") if "def get_config" in f.read_text()}
    mark, = test_what_trains_and_what_is_frozen.pytestmark
    assert {name for name, _ in mark.args[1]} == found


@pytest.mark.parametrize(("name", "sizes"), [
    ("kontext", (2, 32, 4)), ("align", (1, 256, 1)), ("unified", (1, 64, 4))])
def test_full_size_step_lowers_for_256_devices(name, sizes, released):
    """A step on edits at 512x512, from the configs alone."""
    config, here = opened(name, released)
    mesh = jax.sharding.AbstractMesh(sizes, meshes.AXES, (AxisType.Explicit,) * 3)
    timing = optimizer.Config(**config.optimizer)
    update = optimizer.make(timing, config.steps)
    step = make_step(here.loss, update, optimizer.schedule(timing, config.steps), ema=0.9999)
    trained, frozen = stage.abstract(config, here, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        now = jax.eval_shape(functools.partial(state.new, optimizer=update, ema=True), trained)
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = jax.jit(step, donate_argnums=0).trace(now, frozen, edits(config, here, mesh), key)
        after, report = traced.out_info
        lowered = traced.lower(lowering_platforms=("tpu",))
    assert "sdy.sharding" in lowered.as_text()
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(now), strict=True):
        assert (a.shape, a.dtype, split(a)) == (b.shape, b.dtype, split(b))
    assert report["loss"].shape == ()

    # Two moments of each trained weight, and none of any other.
    weights, moments = jax.tree.leaves(now.params), [m for m in jax.tree.leaves(now.opt) if m.ndim]
    assert count(moments) == 2 * count(weights)
    assert set(frozen) - set(trained) == {
        n for n, p in here.parts.items() if p.has_weights} - set(here.trained)
    assert {a.dtype for a in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in (*weights, *moments)} == {jnp.dtype("float32")}

    # Nearly all of them are split over `fsdp`, and what a device holds is little.
    assert count(m for m in moments if "fsdp" in split(m)) > 0.999 * count(moments)
    assert sum(share(mesh, a) * a.dtype.itemsize for a in jax.tree.leaves((now, frozen))
               if a.ndim) < LIMIT / 2


@pytest.mark.parametrize(("changes", "message"), [
    ({"objective": "imitation"}, "objective 'imitation': choose from velocity"),
    ({"trained": ("decoder",)}, "'decoder' is not a part of this stage; its parts are transformer"),
    ({"fresh": ("vae",)}, "'vae' is to be initialized anew but does not train"),
    ({"model": "nowhere"}, "nowhere")])
def test_stages_that_cannot_be(changes, message, micro_model):
    config = micro.point(micro.get_config("kontext"), micro_model)
    config.update(changes)
    with pytest.raises(InputError, match=message):
        stage.open_stage(config)
