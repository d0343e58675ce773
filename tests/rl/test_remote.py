"""Whole runs with a reward on the host: as with the traced one, and with servers that fail."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from short_runs import figures, make_config

from unipic_jax.core.errors import InputError
from unipic_jax.rl import loop, recipe
from unipic_jax.rl.prompts import File
from unipic_jax.rl.rewards import wire

sys.path.insert(0, str(Path(__file__).parent / "rewards"))
from fakes import Fake


@pytest.fixture
def model(blocks_model):
    return blocks_model


HEALTH = {"name": "bright", "version": "1", "scores": ["bright"]}


def brightness(pictures, goal):
    return jnp.round(pictures * 255).mean((1, 2, 3)) / 255


def answers(change=lambda answer: answer):
    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        scores = [{"id": s["id"], "scores": {"bright": float(wire.decode(s["image"]).mean() / 255)}}
                  for s in body["samples"]]
        return 200, change({"version": "1", "samples": scores})

    return answer


def remote(model, url, task="edit", **changes):
    return make_config(model, task, **{
        "rl.server.url": url, "rl.server.retries": 0, "rl.server.timeout": 20.0,
        "rl.server.batch": 3, "rl.chunks": 2, "rl.reward": {"bright": 1.0}} | changes)


KEEPING = {"rl.objective": "nft", "rl.sampling.noise": 0.0, "rl.learn.keep": 10.0,
           "rl.kept.batch": 8}


@pytest.mark.parametrize(("task", "changes", "told"), [
    ("edit", {}, {"source", "target"}), ("generate", KEEPING, {"shape", "relation"})])
def test_it_learns_what_it_does_with_the_traced_reward(
        model, tmp_path, monkeypatch, task, changes, told):
    monkeypatch.setitem(recipe.REWARDS[task], "graded", brightness)
    # An epsilon above the gradients, or Adam would make whole steps of what is rounded.
    changes |= {"steps": 2, "optimizer.learning_rate": 1e-1, "optimizer.eps": 1e-2}
    traced = make_config(model, task, **changes)
    assert loop.reinforce(traced, tmp_path / "traced", progress=False)
    shuffled = answers(lambda a: a | {"samples": a["samples"][::-1]})  # answers out of order
    with Fake(shuffled) as fake:
        config = remote(model, fake.url, task, **changes)
        assert loop.reinforce(config, tmp_path / "host", progress=False)
        asked = [s for body in fake.bodies("/score") for s in body["samples"]]
    assert len(asked) == 2 * 16
    assert all(s["prompt"] and bool(s.get("reference")) == (task == "edit") for s in asked)
    assert told <= set(asked[0]["metadata"])  # the goal of blocks
    kept = ["kept_kl"] * ("rl.learn.keep" in changes)
    for name in ("reward", "grad_norm", *kept):  # the second ones are those after an update
        np.testing.assert_allclose(*(figures(tmp_path / n, name) for n in ("traced", "host")),
                                   rtol=1e-4)


def test_a_server_that_dies_and_returns(model, tmp_path, caplog):
    """The rollout in which it is down teaches nothing, and the run goes on."""
    with Fake(answers()) as fake:
        whole = fake.answer
        calls = []

        def dying(path, body):
            calls.append(path)
            rollout = (calls.count("/score") - 1) // 6  # of 6 requests, 3 a chunk
            return whole(path, body) if path == "/health" or rollout != 1 else (500, {})

        fake.answer = dying
        assert loop.reinforce(remote(model, fake.url), tmp_path / "run", progress=False)
    assert figures(tmp_path / "run", "valid") == [1, 0, 1, 1]
    assert figures(tmp_path / "run", "skipped") == [0, 1, 1, 1]
    assert "16 of 16 samples" in caplog.text or "8 of 8 samples" in caplog.text


@pytest.mark.parametrize(("change", "said"), [
    (lambda a: a | {"samples": a["samples"][1:]}, "scores for"),
    (lambda a: a | {"samples": [s | {"scores": {"bright": float("inf")}} for s in a["samples"]]},
     "bright of sample")])
def test_a_server_that_never_answers_well_stops_the_run(model, tmp_path, change, said, caplog):
    with Fake(answers(change)) as fake, pytest.raises(
            InputError, match="2 steps in a row before step 2 were not finite or had no reward"):
        loop.reinforce(remote(model, fake.url, max_skipped=2), tmp_path / "run", progress=False)
    assert said in caplog.text


def test_a_server_that_is_down_at_the_start(model, tmp_path):
    with Fake(answers()) as fake:
        url = fake.url
    with pytest.raises(InputError, match="the reward is not ready"):
        loop.reinforce(remote(model, url), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with Fake(answers()) as fake, pytest.raises(InputError, match="has no score 'beauty'"):
        loop.reinforce(remote(model, fake.url, **{"rl.reward": {"beauty": 1.0}}),
                       tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_chunks_that_the_devices_cannot_share(model, tmp_path):
    with Fake(answers()) as fake, pytest.raises(
            InputError, match="a batch of 16 does not divide into 4 chunks over 8 devices"):
        loop.reinforce(remote(model, fake.url, **{"rl.chunks": 4}), tmp_path / "run",
                       progress=False)


def test_a_version_that_has_changed_is_said(model, tmp_path, caplog):
    with Fake(answers()) as fake:
        config = remote(model, fake.url, steps=1)
        assert loop.reinforce(config, tmp_path / "run", progress=False)
        (tmp_path / "run/model").rename(tmp_path / "model")
        before = fake.answer

        def newer(path, body):
            return 200, before(path, body)[1] | {"version": "2"}

        fake.answer = newer
        assert loop.reinforce(remote(model, fake.url, steps=2), tmp_path / "run", progress=False)
    assert "bright is now of version 2 and was of 1" in caplog.text


def lines(folder, rows):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_of_a_file(tmp_path, model):
    for i in range(5):
        Image.fromarray(np.full((60, 90, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"prompt": f"edit {i}", "image": f"{i}.png", "tag": "colors", "n": i}
            for i in range(5)]
    prompts = File(lines(tmp_path, rows), "edit", 48)
    drawn = [prompts[0, i] for i in range(15)]
    for time_ in range(3):  # each once before any comes again, and in another order
        assert {p.metadata["n"] for p in drawn[time_ * 5:][:5]} == set(range(5))
    orders = [[p.metadata["n"] for p in drawn[i:i + 5]] for i in (0, 5, 10)]
    assert len(set(map(tuple, orders))) > 1
    for p in drawn:
        n = p.metadata["n"]
        assert p.metadata == {"tag": "colors", "n": n}
        assert p.example.text == f"edit {n}"
        assert p.example.source.shape == (48, 48, 3)
        assert (p.example.source == 40 * n).all()
    assert [prompts[0, i].metadata["n"] for i in (7, 2)] == [orders[1][2], orders[0][2]]
    # And a run on captions alone.
    file = lines(tmp_path, [{"prompt": "a cat", "tag": "single_object"}, {"prompt": "two dogs"}])
    with Fake(answers()) as fake:
        config = remote(model, fake.url, "generate", steps=1, **{"rl.prompts": str(file)})
        assert loop.reinforce(config, tmp_path / "run", progress=False)
        asked = [s for body in fake.bodies("/score") for s in body["samples"]]
    assert {s["prompt"] for s in asked} == {"a cat", "two dogs"}
    assert all(s["metadata"] == ({"tag": "single_object"} if s["prompt"] == "a cat" else {})
               for s in asked)


@pytest.mark.parametrize(("rows", "said"), [
    ([], "has no prompts"), ([3], "prompts.jsonl:1 is not a JSON object"),
    ([{"prompt": "a", "image": "a.png"}], "prompts.jsonl:1: its image .*a.png is missing"),
    ([{"prompt": "a"}], 'prompts.jsonl:1 has no "image" to edit'),
    ([{"text": "a"}], 'prompts.jsonl:1 has no "prompt"')])
def test_bad_prompts(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        File(lines(tmp_path, rows), "edit", 48)


def test_prompts_of_a_file_need_a_server(model, tmp_path):
    with pytest.raises(InputError, match=r"rl\.prompts of a file need a reward server"):
        loop.reinforce(make_config(model, "edit", **{"rl.prompts": "x.jsonl"}), tmp_path / "run",
                       progress=False)
