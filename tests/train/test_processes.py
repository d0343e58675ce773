"""Two processes of four devices each train like one of eight."""

import json
import socket

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from unipic_jax.convert import load
from unipic_jax.model import read_part
from unipic_jax.pipelines import generate

# One task, so that there is one program; and no kept programs, which one process would find and
# the other not, and then wait for it too long.
OPTIONS = ("--config.data.sources.edit.weight=1e-9", "--config.mesh.data=2",
           "--config.mesh.fsdp=4", "--config.optimizer.learning_rate=1e-3")
FRESH = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def two(workdir, *arguments):
    """What the processes of a run have said, the first one first."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    both = [micro.start(workdir, "--distributed", *arguments, devices=4,
                        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2",
                        JAX_PROCESS_ID=str(i), **FRESH) for i in (0, 1)]
    try:
        return [micro.finish(p) for p in both]
    finally:
        for p in both:
            p.kill()


def losses(workdir):
    return [line["loss"] for line in map(
        json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro_model):
    """A run of two processes to step 4, and one of one process; and what the two have said."""
    root = tmp_path_factory.mktemp("processes")
    arguments = [*micro.arguments("kontext", micro_model, steps=4), *OPTIONS]
    said = two(root / "two", *arguments)
    micro.finish(micro.start(root / "one", *arguments, devices=8))
    return root, arguments, said


def test_losses_are_the_same(runs):
    root, *_ = runs
    one, other = losses(root / "one"), losses(root / "two")
    assert len(one) == 4
    np.testing.assert_allclose(other, one, rtol=1e-5)


def test_the_first_process_writes_the_model(runs, micro_model):
    root, _, said = runs
    model = root / "two/model"
    assert [str(model) in text for text in said] == [True, True]
    parts = generate.open_model(model)
    assert set(parts) == set(generate.open_model(micro_model / "kontext"))
    one, other = (jax.tree.leaves(load.read(read_part(root / n / "model/transformer"),
                                            jnp.float32)) for n in ("one", "two"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=3e-4)
    np.testing.assert_array_equal(*(np.concatenate([np.ravel(a) for a in jax.tree.leaves(
        load.read(read_part(f / "vae")))]) for f in (model, micro_model / "kontext")))


def test_one_process_goes_on_with_what_two_have_saved(runs, tmp_path):
    """Without the model, and with two more steps to go by the same schedule as the one's."""
    root, arguments, _ = runs
    (root / "two/model").rename(tmp_path / "model")
    said = micro.finish(micro.start(root / "two", *arguments, devices=8))
    assert "goes on from step 4" in said
    parts = [read_part(f / "transformer") for f in (tmp_path / "model", root / "two/model")]
    for a, b in zip(*(jax.tree.leaves(load.read(p)) for p in parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
