"""Every stage of `configs/`: what trains, and that its step lowers for 256 devices at full size."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import micro
import pytest
from conftest import ROOT
from jax.sharding import AxisType

from benchmarks import random_release
from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.train import config as configs
from unipic_jax.train import optimizer, stage, state
from unipic_jax.train.step import make_step

CONDITIONER = {
    "_class_name": "StableDiffusion3Conditioner", "joint_attention_dim": 4096,
    "llm_hidden_size": 3584, "num_queries": 256, "pooled_projection_dim": 2048,
    "connector_config": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 24,
                         "num_hidden_layers": 24}}
LIMIT = 16 * 2**30  # bytes of memory on a small device, half of which the state may take


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The configs of the release, with the nano family's tokenizers and without weights."""
    root = tmp_path_factory.mktemp("released") / "model"
    shutil.copytree(micro.NANO, root, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, raw in (random_release.configs("full", "bfloat16")
                      | {"conditioner": CONDITIONER}).items():
        folder = root / ("kontext" if (root / "kontext" / name).is_dir() else "metaquery") / name
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / file).write_text(json.dumps(raw))
    return root


def opened(name: str, root):
    config = micro.point(configs.read([f"--config={ROOT}/configs/{name}.py"]), root)
    return config, stage.open_stage(config)


@pytest.mark.parametrize(("name", "trained"), [
    ("kontext", {"transformer"}), ("align", {"conditioner"}),
    ("unified", {"conditioner", "transformer"}),
    ("nano/autoencoder", {"vae"}), ("nano/language", {"mllm"}),
    ("nano/base", {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}),
    ("nano/kontext", {"transformer"}), ("nano/align", {"conditioner"}),
    ("nano/unified", {"conditioner", "transformer"}), ("nano/demo", {"transformer"}),
    ("nano/rl_edit", {"transformer"}), ("nano/rl_generate", {"transformer"})])
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
    whole = here.combine(own, frozen)
    for part, p in here.parts.items():
        if p.has_weights:
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


def edits(config, here, mesh):
    """A batch of edits as `train.collate` makes it."""
    B = config.batch

    def spread(dtype, *shape):
        return jax.ShapeDtypeStruct((B, *shape), dtype,
                                    sharding=meshes.batch_sharding(mesh, 1 + len(shape)))

    batch = {name: spread(jnp.uint8, 512, 512, 3) for name in ("target", "source")}
    if "conditioner" not in here.parts:
        lengths = {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}
        return batch | {"prompt": {n: spread(jnp.int32, S) for n, S in lengths.items()}}
    S, Q, W = 512, here.parts["conditioner"].config.num_queries, 25
    pictures = {"patches": spread(jnp.float32, W, 64, 1176), "places": spread(jnp.int32, W, 64, 2),
                "segments": spread(jnp.int32, W, 64), "order": spread(jnp.int32, W * 16)}
    return batch | {"prompt": {
        "ids": spread(jnp.int32, S), "mask": spread(bool, S + Q),
        "positions": spread(jnp.int32, 3, S + Q), "pictures": pictures}}


def count(arrays):
    return sum(math.prod(a.shape) for a in arrays)


def share(mesh, array):
    """The elements of an array that one device holds."""
    return math.prod(array.shape) / math.prod(mesh.shape[n] for n in split(array) if n)


def split(array):
    """The mesh axis that each axis of a weight is split over."""
    spec = array.sharding.spec if array.ndim else ()
    return *spec, *[None] * (array.ndim - len(spec))


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
