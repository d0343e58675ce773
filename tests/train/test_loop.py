"""Whole runs of `unipic train`: killed, stopped, moved to other devices, and what they write."""

import json
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from unipic_jax.cli import main
from unipic_jax.convert import convert, load, peft, torch_files
from unipic_jax.model import read_part
from unipic_jax.models import autoencoder
from unipic_jax.pipelines import describe, generate
from unipic_jax.train import loop, stage

STEPS = 24
TIMES = {"seconds", "images_per_second", "tflops_per_second", "mfu", "goodput"}


def lines(workdir: Path) -> list[dict]:
    """What a run has reported of each step, but for times; a last line that is cut is left out."""
    file, found = workdir / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in TIMES})
        except ValueError:
            break
    return found


def reached(process, workdir: Path, step: int) -> None:
    """Wait until a run has reported a step."""
    began = time.monotonic()
    while not any(line["step"] >= step for line in lines(workdir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < 300
        time.sleep(0.005)


def stored(workdir: Path, step: int):
    """The state in a checkpoint."""
    return ocp.load_checkpointables(workdir / "checkpoints" / str(step))["state"]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro_model):
    """Stage A on eight devices, unbroken and broken twice; the broken one as it was killed; and
    what the broken one said."""
    root = tmp_path_factory.mktemp("runs")
    arguments = micro.arguments("align", micro_model, steps=STEPS)
    arguments.append("--config.checkpoint.every=3")
    whole, broken, killed = (root / n for n in ("whole", "broken", "killed"))
    said = [micro.finish(micro.start(whole, *arguments, devices=8))]

    run = micro.start(broken, *arguments, devices=8)
    reached(run, broken, 2)
    run.send_signal(signal.SIGTERM)
    said.append(micro.finish(run))
    assert not (broken / "model").exists()

    run = micro.start(broken, *arguments, devices=8)
    reached(run, broken, 10)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not (broken / "model").exists()
    shutil.copytree(broken, killed)

    said.append(micro.finish(micro.start(broken, *arguments, devices=8)))
    return whole, broken, killed, arguments, said


def test_a_broken_run_ends_like_an_unbroken_one(runs):
    whole, broken, *_ = runs
    assert lines(whole) == lines(broken)  # and so it has seen the same data
    assert [line["step"] for line in lines(whole)] == list(range(1, STEPS + 1))
    assert {name for line in lines(whole) for name in line if "/" in name} == {
        "loss/generate", "loss/edit"}
    one, other = stored(whole, STEPS), stored(broken, STEPS)
    assert set(one) >= {"step", "params", "opt", "ema", "skipped"}
    equal(one, other)
    equal(*(load.read(read_part(r / "model/conditioner"), jnp.float32) for r in (whole, broken)))
    assert json.loads((whole / "config.json").read_text())["steps"] == STEPS


def test_sigterm_saves_and_stops(runs):
    *_, said = runs
    stopped, went_on = said[1:]
    step = int(stopped.split("stops at step ")[1].split(";")[0])
    assert 2 <= step < STEPS
    assert "the same command goes on from there" in stopped
    again = int(went_on.split("goes on from step ")[1].split()[0])
    assert step <= again < STEPS


def test_goodput_goes_on_where_it_was(runs):
    """The broken run was launched once, and lost time since."""
    whole, broken, *_ = runs
    first, second = ([json.loads(line).get("goodput") for line in
                      (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, broken))
    assert all(0 < share < 1 for share in (*first[1:], second[-1]))
    kept = [ocp.checkpointables_metadata(broken / "checkpoints" / str(step)).custom_metadata
            ["extra"]["goodput"] for step in (STEPS - 3, STEPS)]
    assert kept[0]["launched"] == kept[1]["launched"]
    assert kept[0]["in_steps"] < kept[1]["in_steps"]
    assert second[-1] < first[-1]


def test_what_is_done_is_not_done_again(runs, capsys):
    whole, _, _, arguments, said = runs
    assert said[0].splitlines()[-1] == str(whole / "model")
    before = lines(whole)
    assert main(["train", "--workdir", str(whole), *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(whole / "model")
    assert lines(whole) == before


def test_resumed_on_fewer_devices(runs):
    whole, _, killed, arguments, _ = runs
    begin = max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit())
    micro.finish(micro.start(killed, *arguments, devices=2))
    one, other = lines(whole), lines(killed)
    assert [line["step"] for line in other] == list(range(1, STEPS + 1))
    for a, b in zip(one[begin:begin + 3], other[begin:begin + 3], strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)


def test_the_model_that_is_written(runs, micro_model, tmp_path):
    """The mean of the parameters, which everything opens."""
    whole, *_ = runs
    model = whole / "model"
    assert not (model / "text_encoder").exists()
    parts = generate.open_model(model, micro_model / "metaquery/qwen2_5_vl")
    assert set(parts) == {"transformer", "vae", "scheduler", "conditioner", "mllm"}
    written = load.read(parts["conditioner"], jnp.float32)
    mean = stored(whole, STEPS)["ema"]["conditioner"]
    equal(written, mean)
    convert.export(load.find(str(model)), tmp_path / "released")
    back = load.read(read_part(tmp_path / "released/conditioner"), jnp.float32)
    equal(back, written)
    config = micro.point(micro.get_config("unified"), micro_model)
    config.model, config.conditioner = str(model), ""
    here = stage.open_stage(config)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    trained, _ = stage.parameters(config, here, mesh)
    equal(trained["conditioner"], written)
    equal(load.read(parts["transformer"]),
          load.read(read_part(micro_model / "kontext/transformer")))


def test_adapters(micro_model, tmp_path):
    arguments = micro.arguments("kontext", micro_model, steps=3)
    arguments += ["--config.lora.rank=2", "--config.lora.alpha=4.0", "--config.samples.count=2",
                  "--config.data.sources.edit.weight=1e-9", "--config.ema=0.0"]
    micro.finish(micro.start(tmp_path / "run", *arguments))
    file, name = (tmp_path / "run/model/lora/transformer" / peft.FILE,
                  "transformer_blocks.0.attn.to_q")
    adapters = load_file(file)
    down, up = (adapters[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
    assert down.shape == (2, 32)
    assert np.abs(up).max() > 0
    convert.export(tmp_path / "run/model", tmp_path / "released")
    merged, _ = torch_files.open_folder(tmp_path / "released/transformer")
    base, _ = torch_files.open_folder(micro_model / "kontext/transformer")
    np.testing.assert_allclose(read(merged[f"{name}.weight"]),
                               read(base[f"{name}.weight"]) + 2 * up @ down, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read(merged["proj_out.weight"]), read(base["proj_out.weight"]))
    saved = stored(tmp_path / "run", 3)
    assert {k[-1].key for k, _ in jax.tree_util.tree_leaves_with_path(saved["params"])} == {
        "lora_a", "lora_b"}
    assert sorted(f.name for f in (tmp_path / "run/samples").iterdir()) == [
        "000003-edit.png", "000003-generate.png"]


def read(tensor):
    return np.asarray(tensor.read(), np.float32)


def test_language_model(micro_model, tmp_path):
    micro.finish(micro.start(tmp_path / "run", *micro.arguments("answer", micro_model, steps=3)))
    model = tmp_path / "run/model"
    part = describe.open_model(load.find(str(model)))
    equal(load.read(part, jnp.float32), stored(tmp_path / "run", 3)["ema"]["mllm"])
    assert set(lines(tmp_path / "run")[0]) >= {"loss/describe", "accuracy"}


def test_autoencoder_is_written_with_its_scale(micro_model, tmp_path):
    """The latents of what it learned from have mean 0 and deviation 1 by its config."""
    config = micro.arguments("reconstruction", micro_model, steps=3)
    micro.finish(micro.start(tmp_path / "run", *config))
    part = read_part(tmp_path / "run/model/vae")
    params = load.read(part, jnp.float32)
    source = micro.point(micro.get_config("reconstruction"), micro_model)
    here = stage.open_stage(source)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    batches = loop.Data(source, here, {}, mesh).batches(0)
    x = np.concatenate([next(batches)[1]["target"] for _ in range(16)])
    encode = jax.jit(lambda x: autoencoder.scale(
        part.config, autoencoder.encode(part.config, params, x / 127.5 - 1).mean))
    z = np.asarray(encode(x.astype(np.float32)))
    assert abs(z.mean()) < 1e-3
    assert abs(z.std() - 1) < 1e-3
    # The model it comes from, which shares files with it, is as it was.
    assert read_part(micro_model / "kontext/vae").config.scaling_factor == 1


def test_too_many_steps_that_are_not_finite(micro_model, tmp_path):
    arguments = micro.arguments("reconstruction", micro_model, max_skipped=3, steps=20)
    run = micro.start(tmp_path / "run", *arguments, "--config.optimizer.learning_rate=1e30")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 2, said
    assert "unipic: 3 steps in a row before step " in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (tmp_path / "run/model").exists()
    # One more step is under way by then.
    assert [line["skipped_in_row"] for line in lines(tmp_path / "run")][-4:] == [1, 2, 3, 4]


@pytest.mark.parametrize(("changes", "message"), [
    (["--config.objective=imitation"], "objective 'imitation': choose from velocity"),
    (["--config.trained=('decoder',)"], "'decoder' is not a part of this stage"),
    (["--config.model=/nowhere"], "nowhere"),
    (["--config.colour=red"], "colour"),
    (["--config.batch=many"], "batch"),
    (["--config.batch=9"], "a batch of 9 does not divide over 8 devices"),
    (["--config.mesh.data=3"], "does not fit 8 devices"),
    (["--config.micro_batches=2"], "a batch of 8 does not divide into 2 micro-batches"),
    (["--config.remat=some"], "remat 'some'"),
    (["--config.lora.rank=2", "--config.lora.targets=('*/nose',)"], "no dense layer is called"),
    (["--config.data.sources.edit.kind=paper"], "the kind of data 'paper' is unknown"),
    (["--colour=red"], "colour")])
def test_what_is_wrong_is_said_in_a_line(changes, message, micro_model, tmp_path, capsys):
    arguments = micro.arguments("kontext", micro_model)
    assert main(["train", "--workdir", str(tmp_path / "run"), *arguments, *changes]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("unipic: ")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "there is no such config file"), ("import nothing_of_that_name", "no"),
    ("def get_config():\n    raise ValueError('not today')", "not today"), ("x = 1", "get_config")])
def test_config_files_that_fail(content, message, tmp_path, capsys):
    file = tmp_path / "stage.py"
    if content is not None:
        file.write_text(content)
    assert main(["train", "--workdir", str(tmp_path / "run"), f"--config={file}"]) == 2
    said, = capsys.readouterr().err.strip().splitlines()
    assert message in said
