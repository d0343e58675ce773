"""Plans of stages: on CPU devices, and compiled for TPUs that are not here."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import micro
import pytest
from conftest import ROOT

from unipic_jax import plan as plans
from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.plan import programs
from unipic_jax.rl.config import nano
from unipic_jax.train import cost, stage

sys.path.append(str(ROOT / ".venv/tpu"))  # libtpu, where it disturbs no other program


@pytest.fixture
def config(micro_model):
    config = micro.point(micro.get_config("kontext"), micro_model)
    config.mesh.update({"data": 2, "fsdp": -1})
    config.dtype, config.remat = "bfloat16", "attention"
    return config


def test_training_on_cpu_devices(config):
    found = plans.plan(config, "cpu:8", kind="train", task="edit")
    here = stage.open_stage(config)
    assert (found["chips"], found["mesh"]) == (8, {"data": 2, "fsdp": 4, "tensor": 1})
    assert found["trained"] == params.count(here.parts["transformer"].specs) - buffers(here)
    assert found["parameters"] == sum(
        params.count(p.specs) for p in here.parts.values() if p.has_weights)

    # The arguments are the state and the batch, of which a device has its share, XLA's padding
    # besides; of the state it has at least a quarter of three copies in float32.
    assert found["memory"]["arguments"] >= 3 * 4 * found["trained"] / 4
    assert found["memory"]["arguments"] < 3 * 4 * found["trained"] + 4 * found["parameters"]
    kinds = {m["kind"] for m in found["collectives"]}
    assert "all-gather" in kinds
    assert kinds & {"all-reduce", "reduce-scatter"}
    assert {m["group"] for m in found["collectives"]} <= {2, 4, 8}
    assert found["left_out"].startswith("times")
    assert "mfu" not in found
    json.dumps(found)

    mesh = meshes.make(data=2)
    batch = programs.make(config, "train", "edit", mesh).arguments[2]
    assert found["flops_per_sample"] == cost.per_sample(config, here, batch)

    # A part that is held whole takes memory, and is not gathered.
    config.whole = ("text_encoder_3",)
    whole = plans.plan(config, "cpu:8", kind="train", task="edit")
    more = 2 * params.count(here.parts["text_encoder_3"].specs)  # bytes of bfloat16
    assert 0 < whole["memory"]["arguments"] - found["memory"]["arguments"] < more
    before, after = (sum(m["size"] for m in f["collectives"] if m["kind"] == "all-gather")
                     for f in (found, whole))
    assert after < before


def buffers(here):
    _own, kept = params.split_buffers(*[here.parts["transformer"].specs] * 2)
    return params.count(kept)


def test_what_is_computed_again(config):
    """Each policy of rematerialization costs more operations and keeps less than the one before;
    for GPUs they are counted all the same."""
    config.micro_batches, config.optimizer.muon = 1, False
    again = []
    for config.remat in ("none", "attention", "full"):
        found = plans.plan(config, "gpu:8", kind="train", task="edit")
        again.append(found["recomputed"])
        assert "memory" in found["left_out"]
        assert "memory" not in found
    assert again[0] < again[1] < again[2]
    here, batch = stage.open_stage(config), programs.make(
        config, "train", "edit", meshes.make(data=2)).arguments[2]
    forward = cost.forward("velocity", here.parts, batch)["transformer"]
    # The scanned layers, of the two that there are; never more than a whole forward.
    assert 0.4 < (again[2] - again[0]) * found["flops_per_sample"] / forward < 1


@pytest.mark.parametrize(("task", "objective"), [("edit", "grpo"), ("generate", "nft")])
def test_operations_of_reinforcement(task, objective):
    """What its cost counts from the config is what its jaxpr has, where nothing is done again."""
    config = nano(task)
    config.rl.objective = objective
    assert bool(config.rl.learn.keep) == (task == "generate")
    found = plans.plan(config, "gpu:1", kind="reinforce", task=task)
    assert found["recomputed"] == pytest.approx(0, abs=0.02)


@pytest.fixture
def tpu(monkeypatch):
    pytest.importorskip("libtpu")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    with jax.default_matmul_precision("default"):
        yield


def check(found, chips):
    assert found["fits"]
    assert found["chips"] == chips
    assert found["seconds"] == max(found["times"].values()) == found["times"][found["bound"]]
    assert 0 < found["mfu"] < 1
    assert found["images_per_second_per_chip"] == pytest.approx(
        found["batch"] / chips / found["seconds"])
    least = found["memory"]["arguments"] + found["memory"]["code"]
    assert least < found["peak"] < found["capacity"]


def test_training_on_a_tpu(tpu, config):
    found = plans.plan(config, "v5e:2x4", kind="train", task="edit")
    check(found, 8)
    assert any(m["count"] > 1 for m in found["collectives"])


def test_training_on_two_slices(tpu, config):
    """Parameters stay inside a slice; what crosses the network is about their gradients."""
    config.mesh.update({"data": 2, "fsdp": -1})
    found = plans.plan(config, "v5e:2x2", kind="train", task="edit", slices=2)
    check(found, 8)
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    across = [m for m in found["collectives"] if m["network"]]
    assert {(m["kind"], m["group"]) for m in across} == {("all-reduce", 2)}
    assert found["times"]["network"] > 0
    # All gradients, spread over a slice's four devices, a few of them whole.
    assert found["trained"] <= sum(m["size"] for m in across) <= 4 * found["trained"]
    config.mesh.update({"data": 1})
    with pytest.raises(InputError, match="data=2"):
        plans.plan(config, "v5e:2x2", kind="train", task="edit", slices=2)


def test_reinforcement_on_a_tpu(tpu, blocks_model):
    """The whole step with its reward inside."""
    config = nano("edit")
    config.model, config.batch, config.rl.group, config.micro_batches = str(blocks_model), 8, 4, 1
    config.rl.objective = "grpo"
    config.rl.sampling.update({"steps": 3, "noise": 0.7, "window": 1, "span": (0, 0)})
    config.mesh.update({"data": 1, "fsdp": -1})
    check(plans.plan(config, "v6e:2x2", kind="reinforce", task="edit"), 4)


def test_what_does_not_fit_is_an_answer(tpu, config, monkeypatch):
    """Whatever the compiler says, with its figures and a suggestion."""
    def much(config, kind, task, mesh):
        rows = jax.ShapeDtypeStruct((mesh.size, 2**33), jnp.float32,
                                    sharding=meshes.batch_sharding(mesh, 2))
        return programs.Program(lambda x: x + 1, (rows,), (), 8, 1.0, 1, 1)

    monkeypatch.setattr(programs, "make", much)
    found = plans.plan(config, "v5e:2x2", kind="train", task="edit")
    assert not found["fits"]
    assert math.isclose(found["capacity"], 15.75 * 2**30)
    assert found["peak"] > 2 * found["capacity"]
    assert found["suggestion"] == "the same batch in more parts: --config.micro_batches=2"


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "unipic_jax", "plan", *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=400)


def test_the_command(micro_model, tmp_path):
    file = tmp_path / "plan.json"
    done = run(*micro.arguments("kontext", micro_model), "--topology", "cpu:2", "--batch", "4",
               "--program", "sample", "--task", "generate", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["chips"], found["batch"], found["program"]) == (2, 4, "sample")
    assert f"{found['flops_per_sample'] / 1e12:.3g} TFLOP a sample" in done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["--topology", "v9:2x2"], "give GENERATION:SHAPE such as v5p:4x4x4"),
    (["--topology", "cpu:none"], "give cpu:N"),
    (["--topology", "cpu:3"], "a batch of 8 does not divide over 3 devices; give --batch"),
    (["--topology", "cpu:2", "--program", "reinforce"], "does not reinforce"),
    (["--topology", "cpu:2", "--task", "describe"], "this stage knows generate, edit")])
def test_messages(micro_model, arguments, message):
    done = run(*micro.arguments("kontext", micro_model), *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
