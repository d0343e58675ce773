"""The reward server on a real socket: the scores of the blocks, bad requests, the command."""

import base64
import http.client
import json
import queue
import struct
import threading
import zlib

import jax
import numpy as np
import pytest
from fakes import pictures

from unipic_jax import __version__
from unipic_jax.cli import main
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks
from unipic_jax.rl.rewards import builtin, host, server, traceable, wire
from unipic_jax.rl.rewards.host import HostReward
from unipic_jax.rl.rewards.http_client import Connection, Remote

REWARDS = {"generate": (traceable.generation, traceable.generation_exact),
           "edit": (traceable.edit, traceable.edit_exact)}


@pytest.fixture
def serve():
    """Start a server of a scorer in a thread; all of them are stopped at the end."""
    started = []

    def start(scorer):
        serving = server.Server(scorer)
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        started.append((serving, thread))
        return serving

    yield start
    for serving, thread in started:
        serving.shutdown()
        thread.join()
        serving.server_close()


def post(serving, body, path="/score", headers={}):
    """(status, JSON) of a request with any body."""
    connection = http.client.HTTPConnection(*serving.server_address, timeout=60)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("task", REWARDS)
def test_served_scores_are_those_of_the_traced_rewards(task, serve):
    """Bit for bit, whatever the batches are."""
    found = blocks.evaluation(task, 4)
    shown = np.where(np.arange(len(found.text))[:, None, None, None] % 2,
                     found.target, np.roll(found.target, 1, 0))
    metadata = json.loads(json.dumps(builtin.goal_metadata(found.goal)))
    serving = serve(builtin.BlocksScorer(task))
    with HostReward(Remote(Connection(serving.url)), batch_size=8, concurrency=2) as asked:
        assert (asked.name, asked.version) == (f"blocks-{task}", __version__)
        ids = np.random.default_rng(0).permutation(1000)[:len(shown)]
        values, valid = asked.submit(shown, found.text, metadata, None, ids).result(60)
    assert valid.all()
    assert values.keys() == {"graded", "exact"}
    floats = shown.astype(np.float32) / 255
    for name, reward in zip(("graded", "exact"), REWARDS[task]):
        assert np.array_equal(values[name], jax.jit(reward)(floats, found.goal))
    assert 0 < values["exact"].mean() < 1


def test_the_same_without_a_server():
    found = blocks.evaluation("generate", 1)
    with HostReward(builtin.BlocksScorer("generate"), batch_size=3) as asked:
        values, valid = asked.submit(found.target, found.text, builtin.goal_metadata(found.goal),
                                     None, range(6)).result(60)
    assert valid.all()
    assert (values["graded"] == 1).all()


def test_samples_that_are_not_of_the_task(serve):
    """Each says why, and the good one beside them is scored."""
    found = blocks.evaluation("generate", 1)
    good = builtin.goal_metadata(found.goal)[0]
    wrong = [{}, good | {"shape": [1]}, good | {"relation": 4}, good | {"count": [1.5, 1]},
             good | {"shape": [[1], 2]}, good | {"colour": [True, False]},
             {"source": good, "target": good}]
    metadata = [good, *wrong]
    images = np.stack([found.target[0]] * len(metadata))
    serving = serve(builtin.BlocksScorer("generate"))
    with HostReward(Remote(Connection(serving.url))) as asked:
        values, valid = asked.submit(images, [""] * len(metadata), metadata, None,
                                     range(len(metadata))).result(60)
        assert valid.tolist() == [True] + [False] * len(wrong)
        assert values["exact"].tolist() == [1] + [0] * len(wrong)
        assert not asked.submit(pictures([1], 32), [""], [good], None, [0]).result(60).valid.any()
    answer = builtin.BlocksScorer("generate").score([
        host.Sample(0, images[0], "", {}), host.Sample(1, pictures([1], 32)[0], "", good)])
    assert [s.error for s in answer.scores] == [
        "its metadata is no goal of blocks to generate",
        "a picture of blocks is 48x48, and this one 32x32"]


def test_bad_requests_are_answered_and_survived(serve):
    class Plain:
        def health(self):
            return host.Health("plain", "1", ("a",))

        def score(self, samples):
            return host.Answer("1", [host.Score(s.id, {"a": 1.0}) for s in samples])

    serving = serve(Plain())
    good = {"id": 1, "image": wire.encode(pictures([1])[0]), "prompt": "", "metadata": {}}
    cut = good["image"][:len(good["image"]) // 2 // 4 * 4]

    def sample(**changes):
        return {"samples": [{k: v for k, v in (good | changes).items() if v is not None}]}

    for body, message in [
            (b"", "not JSON"), (b"{", "not JSON"), (b"[" * 100_000, "not JSON"),
            (b"\xff", "not JSON"), ([], "must be"), ({}, "must be"), ({"samples": 1}, "must be"),
            ({"samples": [1]}, "must have id"), (sample(id="1"), "must have id, of type int"),
            (sample(image=None), "must have image"), (sample(prompt=1), "must have prompt"),
            (sample(metadata=[]), "must have metadata"), (sample(image="..."), "not a PNG"),
            (sample(image="aGVsbG8="), "not a PNG"), (sample(image=cut), "not a PNG"),
            (sample(reference=3), "not a PNG"), ({"samples": [good, good]}, "the same id")]:
        status, found = post(serving, body)
        assert (status, found.keys()) == (400, {"error"}), body
        assert message in found["error"], body
        assert "\n" not in found["error"]
    for length in ("many", "-1", str(2**40)):
        status, found = post(serving, b"", headers={"Content-Length": length})
        assert status == 400
        assert "Content-Length must be" in found["error"]
    assert post(serving, {}, "/elsewhere")[0] == 404
    assert post(serving, {"samples": [good]}) == (
        200, {"version": "1", "samples": [{"id": 1, "scores": {"a": 1.0}}]})


@pytest.mark.parametrize(("fault", "status", "message"), [
    (ZeroDivisionError("it is\nzero"), 500, "ZeroDivisionError: it is zero"),
    (host.Unavailable("the detector is down"), 503, "the detector is down"),
    (host.BadAnswer("the detector says nan"), 502, "the detector says nan"),
    (None, 502, "0 scores for 1 samples")])
def test_a_scorer_that_fails(fault, status, message, serve):
    class Failing:
        def health(self):
            return host.Health("failing", "1", ("a",))

        def score(self, samples):
            if fault:
                raise fault
            return host.Answer("1", [])

    serving = serve(Failing())
    body = wire.samples_to_json([host.Sample(1, pictures([1])[0], "", {})])
    for _ in range(2):
        assert post(serving, body) == (status, {"error": message})


def test_pictures_are_limited():
    """A PNG of which the header says that it is enormous is not unpacked."""
    data = bytearray(base64.b64decode(wire.encode(np.zeros((1, 1, 3), np.uint8))))
    data[16:24] = struct.pack(">II", 5000, 5000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(InputError, match="5000x5000"):
        wire.decode(base64.b64encode(data).decode())


def test_the_command(monkeypatch, capsys):
    running = queue.Queue()
    forever = server.Server.serve_forever

    def serve_forever(self):
        running.put(self)
        forever(self, 0.01)

    monkeypatch.setattr(server.Server, "serve_forever", serve_forever)
    command = ["reward-server", "--reward", "blocks-edit", "--port", "0"]
    thread = threading.Thread(target=main, args=(command,))
    thread.start()
    serving = running.get(timeout=60)
    try:
        printed = capsys.readouterr().out
        assert printed == f"{serving.url}: blocks-edit {__version__}\n"
        assert Remote(Connection(serving.url)).health() == (
            "blocks-edit", __version__, ("graded", "exact"))
        taken = str(serving.server_address[1])
        assert main([*command[:-1], taken]) == 2
        err = capsys.readouterr().err
        assert err == (f"unipic: cannot listen on 127.0.0.1:{taken}: Address already in use; "
                       "choose another port\n")
    finally:
        serving.shutdown()
        thread.join()


@pytest.mark.parametrize(("more", "message"), [
    (["--reward", "beauty", "--port", "0"], "invalid choice: 'beauty'"),
    (["--reward", "blocks-edit", "--port", "70000"], "--port must lie between 0 and 65535"),
    (["--reward", "geneval", "--port", "0"], "--detector goes with --reward geneval"),
    (["--reward", "blocks-edit", "--port", "0", "--detector", "http://localhost:1"],
     "--detector goes with --reward geneval"),
    (["--reward", "geneval", "--port", "0", "--detector", "localhost"],
     "'localhost' is not the address of a server"),
    (["--reward", "blocks-edit"], "required: --port")])
def test_bad_arguments(more, message, capsys):
    assert main(["reward-server", *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("unipic: ")
    assert err.count("\n") == 1
    assert message in err
