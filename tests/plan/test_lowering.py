"""Every stage's step at full size, from configs alone, lowers for pods: a device's shapes and
shardings are right, whatever the mesh."""

import jax
import jax.numpy as jnp
import pytest
from full_size import count, opened, share, split
from jax.sharding import AxisType

from unipic_jax.core import mesh as meshes
from unipic_jax.plan import programs

MEMORY = 16 * 2**30  # of a small device; half of it is for what is computed
# (data, fsdp, tensor); two slices of 256 have their parameters inside of each.
MESHES = {"8": (1, 8, 1), "64": (1, 16, 4), "256": (16, 16, 1), "2x256": (2, 256, 1)}
STAGES = ["kontext", "align", "unified", "edit_judge", "pdtr_edit_512", "pdtr_t2i_512",
          "pdtr_edit_512 metaquery"]


def stage_of(name, root, devices):
    """The config of a stage that needs all its parts, what runs it, and its task."""
    name, *policy = name.split()
    config, _ = opened(name, root)
    config.batch = max(config.batch, devices)
    if policy:
        config.mllm = str(root / "metaquery/qwen2_5_vl")
        config.conditioner = str(root / "metaquery/conditioner")
    if name.startswith("pdtr"):
        config.judge = str(root / "edit_judge")
        config.rl.sampling.guidance_scale = 3.5
        return config, "reinforce", config.rl.task
    if name == "edit_judge":
        config.mllm = str(root / "edit_judge")
        return config, "train", "describe"
    config.ema = 0.9999
    return config, "train", "generate" if name == "align" else "edit"


def test_texts_are_as_long_as_the_release_has_them(released):
    mesh = jax.sharding.AbstractMesh(MESHES["8"], meshes.AXES, (AxisType.Explicit,) * 3)
    config, kind, task = stage_of("kontext", released, mesh.size)
    prompt = programs.make(config, kind, task, mesh).arguments[2]["prompt"]
    assert {n: a.shape[1] for n, a in prompt.items()} == {
        "text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("size", MESHES)
def test_full_size_step_lowers(name, size, released):
    mesh = jax.sharding.AbstractMesh(MESHES[size], meshes.AXES, (AxisType.Explicit,) * 3)
    config, kind, task = stage_of(name, released, mesh.size)
    program = programs.make(config, kind, task, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(program.function, donate_argnums=program.donated).trace(
            *program.arguments)
        lowered = traced.lower(lowering_platforms=("tpu",))
    assert "sdy.sharding" in lowered.as_text()
    (now, frozen, *_), (after, report, *_) = program.arguments, traced.out_info
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(now), strict=True):
        assert (a.shape, a.dtype, split(a)) == (b.shape, b.dtype, split(b))
    wanted = {"loss"} if kind == "train" else {"reward", "kl", "collapsed", "mismatch_p99"}
    assert wanted <= set(report)

    # Two moments of each trained weight, and none of any other.
    weights = jax.tree.leaves(now.params)
    moments = [m for m in jax.tree.leaves(now.opt) if m.ndim]
    assert count(weights) == program.trained
    assert count(moments) == 2 * count(weights)
    assert {a.dtype for a in (*weights, *moments)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(frozen)} <= {jnp.dtype("bfloat16")}
    assert count(jax.tree.leaves(frozen)) >= program.parameters - program.trained

    # Nearly all of them are split over `fsdp` (adapters are small), and a device holds little.
    if not config.lora.rank:
        assert count(m for m in moments if "fsdp" in split(m)) > 0.999 * count(moments)
    if mesh.size >= 64:
        assert sum(share(mesh, a) * a.dtype.itemsize for a in jax.tree.leaves((now, frozen))
                   if a.ndim) < MEMORY / 2
