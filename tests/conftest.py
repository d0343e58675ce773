"""Tests run on 8 virtual CPU devices, at the highest matmul precision, with compiled programs
kept between runs."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"

import json  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import micro  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from benchmarks import random_release  # noqa: E402
from unipic_jax.convert import load  # noqa: E402
from unipic_jax.model import read_part  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"


def relative(a, b) -> float:
    """Relative L2 error of a against b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def last(a) -> np.ndarray:
    """Channels first to channels last."""
    return np.moveaxis(np.asarray(a), 1, -1)


def first(a) -> np.ndarray:
    """Channels last to channels first."""
    return np.moveaxis(np.asarray(a), -1, 1)


@pytest.fixture(scope="session")
def golden():
    return np.load(GOLDENS / "goldens.npz")


@pytest.fixture(scope="session")
def meta():
    return json.loads((GOLDENS / "goldens.json").read_text())


@pytest.fixture(scope="session")
def kontext():
    """The golden checkpoint's parts: name -> (config, float32 parameters)."""
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    parts = {n: read_part(GOLDENS / "kontext" / n) for n in names}
    return {n: (p.config, load.read(p, jnp.float32)) for n, p in parts.items()}


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory):
    """The folder of the model that `micro` describes."""
    return micro.make_model(tmp_path_factory.mktemp("micro") / "model")


@pytest.fixture(scope="session")
def blocks_model(tmp_path_factory):
    """The smallest model with an autoencoder of three levels, since blocks are of 48 pixels."""
    root = micro.make_model(tmp_path_factory.mktemp("rl") / "model") / "kontext"
    file = root / "vae/config.json"
    raw = json.loads(file.read_text()) | {
        "block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3}
    file.write_text(json.dumps(raw))
    for weights in file.parent.glob("*.safetensors"):
        weights.unlink()
    random_release.write_weights(read_part(file.parent), "kontext/vae", "F32", 0, False)
    return root


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """The folder of the model that `full_size` describes."""
    import full_size
    return full_size.make(tmp_path_factory.mktemp("released") / "model")


@pytest.fixture(scope="session")
def mmdit_apply():
    """The jitted transformer, shared so that each shape compiles once."""
    from unipic_jax.models import mmdit
    return jax.jit(mmdit.apply, static_argnames=("cfg", "skip_layers", "remat", "dtype"))
