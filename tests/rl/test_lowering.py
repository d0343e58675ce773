"""The whole step of PDTR at full size, judge included, lowers for 64 devices."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from full_size import edits, opened, split
from jax.sharding import AxisType

from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.rl import learn, recipe
from unipic_jax.train import optimizer, stage


@pytest.mark.parametrize("policy", ["kontext", "metaquery"])
def test_full_size_step_lowers_for_64_devices(policy, released):
    config, here = opened("pdtr_edit_512", released)
    if policy == "metaquery":
        config.mllm = str(released / "metaquery/qwen2_5_vl")
        config.conditioner = str(released / "metaquery/conditioner")
        here = stage.open_stage(config)
    config.judge = "configs/edit_judge"  # as a folder that has the head
    recipe.check(config, here)
    judge = stage.open_judge(released / "metaquery/qwen2_5_vl", Path(config.judge))
    config.rl.sampling.guidance_scale = 3.5
    config.micro_batches = 4
    mesh = jax.sharding.AbstractMesh((1, 16, 4), meshes.AXES, (AxisType.Explicit,) * 3)
    timing = optimizer.Config(**config.optimizer)
    update = optimizer.make(timing, config.steps)
    trained, frozen = stage.abstract(config, here, mesh)
    frozen["judge"] = {n: params.abstract(p.specs, jnp.bfloat16, mesh) for n, p in judge.items()}
    parts = recipe.functions(config, here, update, optimizer.schedule(timing, config.steps))
    step = recipe.make_step(config, parts, judge)
    count = config.batch // config.rl.group
    assert (count, config.rl.group, config.lora.rank) == (16, 16, 32)

    def spread(dtype, *shape):
        return jax.ShapeDtypeStruct((count, *shape), dtype,
                                    sharding=meshes.batch_sharding(mesh, 1 + len(shape)))

    prompts = edits(config, here, mesh, count)
    del prompts["target"]
    S = 1024  # two pictures and the instruction
    prompts |= {"negative": prompts["prompt"], "judge": {
        "ids": spread(jnp.int32, S), "mask": spread(bool, S), "positions": spread(jnp.int32, 3, S)}}
    with jax.sharding.use_abstract_mesh(mesh):
        begin = functools.partial(learn.new, recipe.learning(config), optimizer=update)
        now = jax.eval_shape(begin, trained)
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = jax.jit(step, donate_argnums=0).trace(now, frozen, prompts, key)
        after, report = traced.out_info
        lowered = traced.lower(lowering_platforms=("tpu",))
    assert "sdy.sharding" in lowered.as_text()
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(now), strict=True):
        assert (a.shape, a.dtype, split(a)) == (b.shape, b.dtype, split(b))
    assert {"reward", "kl", "collapsed", "mismatch_p99"} <= set(report)
