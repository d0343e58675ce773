"""What is written of a run: lines, means, resuming, speed, pictures, displays."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unipic_jax.core.errors import InputError
from unipic_jax.train import metrics


def report(loss: float, skipped: int = 0) -> dict[str, jax.Array]:
    return {"loss": jnp.float32(loss), "skipped": jnp.int32(skipped),
            "quarter_loss": jnp.array([loss, 0, 1, 2], jnp.float32),
            "quarter_count": jnp.array([loss, 0, 1, 1], jnp.float32)}


def run(folder, steps, *, first=0, every=4, **options):
    with metrics.Writer(folder, first, 100, 8, every=every, **options) as writer:
        return [writer.write(k, report(k), "edit" if k % 2 else "generate") for k in steps]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder):
    """(name, step, value) of all scalars, and the steps from which others were purged."""
    from tensorboardX.proto.event_pb2 import Event
    scalars, starts = [], []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12:12 + size]), data[16 + size:]
            if event.HasField("session_log"):
                starts.append(event.step)
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value
                        if v.HasField("simple_value")]
    return scalars, starts


def test_lines_hold_means_since_the_line_before(tmp_path):
    given = run(tmp_path, range(1, 10))
    assert given[0] is None
    assert [int(r["loss"]) for r in given[1:]] == list(range(1, 9))
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (4, 8)
    assert first["loss"] == 2.5
    assert first["loss/edit"] == 2
    assert first["loss/generate"] == 3
    # Weighted by how many samples each step had: (1 + 4 + 9 + 16) / (1 + 2 + 3 + 4).
    assert first["quarter_loss"] == [3, None, 1, 2]
    assert "quarter_count" not in first
    assert second["images_per_second"] > 0
    assert second["seconds"] >= first["seconds"]


def test_counts_stay_and_what_is_not_finite_is_left_out(tmp_path):
    with metrics.Writer(tmp_path, 0, 100, 8, every=3) as writer:
        for k, (loss, skipped) in enumerate([(1, 0), (np.nan, 1), (2, 1)]):
            writer.write(k + 1, report(loss, skipped), "edit")
        for k in (3, 4, 5):
            writer.write(k + 1, {"loss": jnp.float32(np.inf)}, "edit")
    first, second = lines(tmp_path)
    assert (first["loss"], first["skipped"]) == (1.5, 1)
    assert second["loss"] is None


def test_resumed(tmp_path):
    run(tmp_path, range(1, 13))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 16, "lo')
    run(tmp_path, range(7, 13), first=6)
    assert [x["step"] for x in lines(tmp_path)] == [4, 8, 12]
    assert lines(tmp_path)[1]["loss"] == 7.5
    seconds = [x["seconds"] for x in lines(tmp_path)]
    assert seconds == sorted(seconds)
    scalars, starts = board(tmp_path)
    assert ("loss", 4, 2.5) in scalars
    assert ("quarter_loss/3", 4, 2.0) in scalars
    assert starts == [1, 7]


def test_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.counts, "mfu", lambda flops, devices: flops / 1e15)
    with metrics.Writer(tmp_path, 0, 100, 8, every=2, flops={"edit": 1e12}) as writer:
        for k in range(1, 6):
            writer.write(k, report(k), "edit")
            with writer.paused():
                time.sleep(0.05)
            time.sleep(0.4 if k == 1 else 0.02)  # the first step compiles
    first, second = lines(tmp_path)
    for line, steps in ((first, 1), (second, 2)):
        assert 8 * 5 < line["images_per_second"] < 8 / 0.02
        assert line["tflops_per_second"] == pytest.approx(line["images_per_second"] / 8)
        assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 1e3), steps


def test_the_step_before_is_read_only(tmp_path):
    """A step that is not done yet is not waited for."""
    class Unread:
        def __array__(self, *_):
            raise AssertionError("it was read")

    writer = metrics.Writer(tmp_path, 0, 100, 8, every=1)
    assert writer.write(1, report(1), "edit") is None
    assert writer.write(2, {"loss": Unread()}, "edit")["loss"] == 1


def test_scores_are_in_the_line_of_their_step(tmp_path):
    with metrics.Writer(tmp_path, 0, 3, 8, every=100) as writer:
        writer.scores(0, {"accuracy": 0.25})
        for k in (1, 2, 3):
            writer.write(k, report(k), "edit")
            if k == 2:
                writer.scores(2, {"accuracy": 0.5})
                writer.scores(2, {"kept": 1.0})
    assert [(x["step"], x.get("accuracy"), x.get("kept"), x.get("loss")) for x in lines(tmp_path)
            ] == [(0, 0.25, None, None), (2, 0.5, 1.0, 1.5), (3, None, None, 3)]


def test_pictures(tmp_path):
    with metrics.Writer(tmp_path, 0, 3, 8, every=1) as writer:
        writer.picture(123, Image.new("RGB", (8, 4), "red"), "edit")
    assert Image.open(tmp_path / "samples/000123-edit.png").size == (8, 4)


def test_display(tmp_path, monkeypatch, capsys):
    run(tmp_path / "a", range(1, 101), every=10)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # not every 10 steps, for they are fast; the first and the last
    assert said[-1].startswith("step 100/100  loss 95.5000  ")
    run(tmp_path / "b", range(1, 9), progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tmp_path / "c", range(1, 9))
    assert "loss 6.5000" in capsys.readouterr().err


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.Writer(tmp_path / "run", 0, 3, 8, every=1) as writer:
        assert writer.write(1, report(1), "edit") is None
        assert writer.write(2, report(2), "edit")["loss"] == 1
        writer.scores(2, {"accuracy": 0.5})
        writer.picture(2, Image.new("RGB", (8, 4)), "edit")
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        metrics.Writer(tmp_path / "file", 0, 3, 8, every=1)
