"""Several processes, eight devices in all, train like one of eight."""

import json
import shutil

import jax
import jax.numpy as jnp
import micro
import numpy as np
import processes
import pytest

from unipic_jax.convert import load
from unipic_jax.model import read_part
from unipic_jax.pipelines import generate

# One task, so that there is one program.
OPTIONS = ("--config.data.sources.edit.weight=1e-9", "--config.mesh.data=2",
           "--config.mesh.fsdp=4", "--config.optimizer.learning_rate=1e-3",
           "--config.checkpoint.every=2")


def losses(workdir):
    return [line["loss"] for line in map(
        json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro_model):
    """A run of two processes to step 4, one of four, one of one, and one of one with frozen parts
    whole on every device; and what the two have said."""
    root = tmp_path_factory.mktemp("processes")
    arguments = [*micro.arguments("kontext", micro_model, steps=4), *OPTIONS]
    said = processes.finish(processes.start(2, root / "two", *arguments))
    processes.finish(processes.start(4, root / "four", *arguments))
    for name, more in (("one", ()), ("whole", ["--config.whole=('text_encoder_3', 'vae')"])):
        micro.finish(micro.start(root / name, *arguments, *more, devices=8))
    return root, arguments, said


@pytest.mark.parametrize("name", ["two", "four", "whole"])
def test_losses_are_the_same(runs, name):
    root, *_ = runs
    one, other = losses(root / "one"), losses(root / name)
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


def test_what_four_have_saved_goes_on_anywhere(runs, tmp_path):
    """Four steps of four processes, and two more of one and of two."""
    root, arguments, _ = runs
    more = [*arguments, "--config.steps=6"]
    found = []
    for count in (1, 2):
        workdir = shutil.copytree(root / "four", tmp_path / str(count))
        shutil.rmtree(workdir / "model")
        if count == 1:
            said = [micro.finish(micro.start(workdir, *more, devices=8))]
        else:
            said = processes.finish(processes.start(count, workdir, *more))
        assert "goes on from step 4" in said[0]
        found.append(losses(workdir))
    assert len(found[0]) == 6
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_one_of_two_is_killed(micro_model, tmp_path):
    """The other stops when it misses its heartbeat, and the same command ends with the same bits
    as a run that nothing has broken."""
    arguments = [*micro.arguments("kontext", micro_model, steps=8), *OPTIONS]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    processes.kill_one(broken, *arguments, when=lambda: (
        broken / "metrics.jsonl").exists() and len(losses(broken)) >= 3)
    said, _ = processes.finish(processes.start(2, broken, *arguments))
    assert "goes on from step" in said
    processes.finish(processes.start(2, whole, *arguments))
    assert losses(broken) == losses(whole)
    one, other = (jax.tree.leaves(load.read(read_part(w / "model/transformer")))
                  for w in (broken, whole))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
