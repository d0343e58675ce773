"""Stages at the released size, without weights: shapes on abstract meshes."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
from conftest import ROOT

from benchmarks import random_release
from unipic_jax.core import mesh as meshes
from unipic_jax.train import config as configs
from unipic_jax.train import stage

make = random_release.without_weights


def opened(name: str, root: Path):
    """The config of a stage, its parts those in `root`, and what it comes to."""
    config = micro.point(configs.read([f"--config={ROOT}/configs/{name}.py"]), root)
    return config, stage.open_stage(config)


def edits(config, here, mesh, count=None):
    """A batch of edits as `train.collate` makes it; of `count` rows, or those of the config."""
    B = count or config.batch

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
