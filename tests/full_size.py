"""Stages at the released size, without weights: shapes on abstract meshes."""

import math
from pathlib import Path

import micro
from conftest import ROOT

from benchmarks import random_release
from unipic_jax.train import config as configs
from unipic_jax.train import stage

make = random_release.without_weights


def opened(name: str, root: Path):
    """The config of a stage, its parts those in `root`, and what it comes to."""
    config = micro.point(configs.read([f"--config={ROOT}/configs/{name}.py"]), root)
    return config, stage.open_stage(config)


def count(arrays):
    return sum(math.prod(a.shape) for a in arrays)


def share(mesh, array):
    """The elements of an array that one device holds."""
    return math.prod(array.shape) / math.prod(mesh.shape[n] for n in split(array) if n)


def split(array):
    """The mesh axis that each axis of a weight is split over."""
    spec = array.sharding.spec if array.ndim else ()
    return *spec, *[None] * (array.ndim - len(spec))
