"""Host rewards against real sockets: what they ask and give, and every way to fail."""

import json
import logging
import re
import threading
import time

import numpy as np
import pytest
from fakes import HEALTH, Fake, pictures, scored, scorer, value

from unipic_jax.core.errors import InputError
from unipic_jax.rl.rewards import host, wire
from unipic_jax.rl.rewards.host import HostReward
from unipic_jax.rl.rewards.http_client import Connection, Remote

IDS = [41, 3, 900, 7, 0, 12, 5, 6, 77, 1]


def reward(fake, *, batch_size=4, concurrency=3, **patience):
    patience = {"timeout": 60, "retries": 1, "backoff": 0.01} | patience
    return HostReward(Remote(Connection(fake.url, **patience)), batch_size=batch_size,
                      concurrency=concurrency)


def submit(asked, ids=IDS, **more):
    given = {"images": pictures(ids), "prompts": [f"picture {i}" for i in ids],
             "metadata": [{"n": i} for i in ids], "ref_images": None, "sample_ids": ids} | more
    return asked.submit(**given)


def assert_right(found, ids=IDS, valid=None):
    """Valid samples have the scores of their ids, in the order of the ids, and the others none."""
    values, there = found
    assert there.dtype == bool
    assert there.tolist() == ([True] * len(ids) if valid is None else valid)
    assert values.keys() == {"good", "fair"}
    for name, row in values.items():
        assert row.dtype == np.float32
        assert row.tolist() == [value(i)[name] * v for i, v in zip(ids, there)]


def test_what_goes_out_and_comes_back():
    with Fake(scorer()) as fake, reward(fake) as asked:
        assert (asked.name, asked.version, asked.names) == ("fake", "1", ("good", "fair"))
        references = [pictures([i + 1000], side=3 + k)[0] for k, i in enumerate(IDS)]
        assert_right(submit(asked, ref_images=references).result(60))
        sent = [s for body in fake.bodies("/score") for s in body["samples"]]
    assert sorted(s["id"] for s in sent) == sorted(IDS)
    for s in sent:
        assert s["prompt"] == f"picture {s['id']}"
        assert s["metadata"] == {"n": s["id"]}
        assert np.array_equal(wire.decode(s["image"]), pictures([s["id"]])[0])
        assert np.array_equal(wire.decode(s["reference"]), references[IDS.index(s["id"])])


def test_many_at_once_and_no_more():
    """Batches of at most 4, always 2 of them at once and never 3, while the caller goes on."""
    both, busy, most, lock = threading.Barrier(2, timeout=60), [0], [0], threading.Lock()

    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        both.wait()
        time.sleep(0.02)
        with lock:
            busy[0] -= 1
        return 200, scored(body)

    with Fake(answer) as fake, reward(fake, concurrency=2) as asked:
        future = submit(asked, [*range(16)])
        assert not future.done()
        assert_right(future.result(60), [*range(16)])
        assert [len(b["samples"]) for b in fake.bodies("/score")] == [4] * 4
        assert most[0] == 2
        assert_right(submit(asked, []).result(60), [])


def test_answers_out_of_order():
    """The first request is answered last, and each of them backwards."""
    last = threading.Event()

    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        ids = [s["id"] for s in body["samples"]]
        if IDS[0] in ids:
            assert last.wait(60)
        if IDS[-1] in ids:
            last.set()
        found = scored(body)
        return 200, found | {"samples": found["samples"][::-1]}

    with Fake(answer) as fake, reward(fake) as asked:
        assert_right(submit(asked).result(60))


def test_a_server_that_is_down_is_refused():
    fake = Fake(scorer())
    fake.stop()
    with pytest.raises(InputError, match=r"not ready: .*Connection refused; start it") as e:
        reward(fake)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("health", [
    (200, {"name": "fake", "version": "1"}), (200, {"name": 1, "version": "1", "scores": ["a"]}),
    (200, [1]), (200, b"<html>"), (404, {}), (500, {"error": "out of\nmemory"})])
def test_a_server_that_is_not_well_is_refused(health):
    with Fake(lambda path, body: health) as fake, pytest.raises(InputError, match="not ready") as e:
        reward(fake)
    assert "\n" not in str(e.value)


def test_a_server_that_dies_and_returns(caplog):
    """Nothing is learnt from it meanwhile, the log says so once, and then all is well again."""
    caplog.set_level(logging.INFO)
    fake = Fake(scorer())
    with reward(fake) as asked:
        assert_right(submit(asked).result(60))
        fake.stop()
        for _ in range(3):
            assert_right(submit(asked).result(60), valid=[False] * len(IDS))
        fake.start()
        for _ in range(2):
            assert_right(submit(asked).result(60))
        fake.stop()
    said = [r for r in caplog.records if r.name == host.__name__]
    assert [r.levelname for r in said] == ["WARNING", "INFO"]
    assert "10 of 10 samples have no score" in said[0].message
    assert "Connection refused" in said[0].message
    assert said[1].message == "reward fake is back; 30 samples were left out"


def test_a_server_that_dies_while_it_answers():
    def breaks_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"version"')

    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        bad = any(s["id"] == 900 for s in body["samples"])
        return 200, breaks_off if bad else scored(body)

    with Fake(answer) as fake, reward(fake) as asked:
        assert_right(submit(asked).result(60), valid=[False] * 4 + [True] * 6)
        assert len(fake.bodies("/score")) == 4  # it was tried once more


@pytest.mark.parametrize("how", ["silent", "trickling"])
def test_a_slow_answer_is_not_valid_and_not_asked_for_again(how, caplog):
    given_up = threading.Event()

    def trickle(handler):
        handler.send_response(200)
        handler.end_headers()
        while not given_up.wait(0.05):  # JSON may begin with many spaces
            handler.wfile.write(b" ")

    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        if how == "silent":
            given_up.wait(90)
        return 200, trickle

    class Hasty(Remote):
        def health(self):  # whatever else the machine does
            return Remote(Connection(fake.url)).health()

    with Fake(answer) as fake:
        hasty = Hasty(Connection(fake.url, timeout=0.7, backoff=0.01))
        with HostReward(hasty, batch_size=4, concurrency=3) as asked:
            began = time.monotonic()
            assert_right(submit(asked).result(60), valid=[False] * len(IDS))
            assert time.monotonic() - began < 45  # and not for ever
            given_up.set()
        assert len(fake.bodies("/score")) <= 3
    assert "10 of 10 samples" in caplog.text
    assert "no answer in 0.7 s" in caplog.text


def first(**changes):
    """A change of the first entry of an answer."""
    def change(answer):
        answer["samples"][0] |= changes
        return answer
    return change


BAD = {
    "NaN": (first(scores={"good": float("nan"), "fair": 1}), "good of sample 41 is nan"),
    "infinite": (first(scores={"good": 1, "fair": 1e300}), r"fair of sample 41 is 1e\+300"),
    "null": (first(scores={"good": None, "fair": 1}), "no number for good of sample 41"),
    "text": (first(scores={"good": "1", "fair": 1}), "no number for good"),
    "bool": (first(scores={"good": True, "fair": 1}), "no number for good"),
    "a name less": (first(scores={"good": 1}), "no number for fair"),
    "no scores": (lambda a: a | {"samples": [{"id": s["id"]} for s in a["samples"]]},
                  "neither scores nor an error"),
    "one less": (lambda a: a | {"samples": a["samples"][1:]}, "3 scores for 4 samples"),
    "one more": (lambda a: a | {"samples": [*a["samples"], {"id": 5, "scores": value(5)}]},
                 "5 scores for 4 samples"),
    "unknown": (first(id=1234), "a score of sample 1234, which was not asked for"),
    "twice": (first(id=3), "two scores of one sample"),
    "id of text": (first(id="41"), "without version and samples"),
    "no version": (lambda a: {"samples": a["samples"]}, "without version and samples"),
    "a list": (lambda a: a["samples"], "not answer with a JSON object"),
    "malformed": (lambda a: json.dumps(a).encode()[:-3], "malformed JSON"),
    "HTML": (lambda a: b"<html>welcome</html>", "malformed JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_an_error_and_none_of_it_is_used(case, caplog):
    """It is logged as an error; the requests beside it and those that follow are not touched."""
    change, message = BAD[case]
    bad = [True]

    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        right = scored(body)
        return 200, change(right) if bad[0] and right["samples"][0]["id"] == 41 else right

    with Fake(answer) as fake, reward(fake) as asked:
        for _ in range(2):
            assert_right(submit(asked).result(60), valid=[False] * 4 + [True] * 6)
        assert len(fake.bodies("/score")) == 6  # the same request would get the same answer
        bad[0] = False
        assert_right(submit(asked).result(60))
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.levelname for r in said] == ["ERROR"]
    assert "4 of 10 samples have no score" in said[0].message
    assert re.search(message, said[0].message)


def test_one_sample_that_cannot_be_scored(caplog):
    def change(answer):
        answer["samples"] = [{"id": 900, "error": "it is blank"} if s["id"] == 900 else s
                             for s in answer["samples"]]
        return answer

    with Fake(scorer(change)) as fake, reward(fake) as asked:
        for _ in range(2):
            assert_right(submit(asked).result(60), valid=[i != 900 for i in IDS])
    assert caplog.text.count("it is blank") == 1


def test_retries_after_growing_waits():
    left = [2]

    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        left[0] -= 1
        return (200, scored(body)) if left[0] < 0 else (503, {"error": "busy"})

    with Fake(answer) as fake, reward(fake, batch_size=16, retries=2, backoff=0.1) as asked:
        assert_right(submit(asked).result(60))
        times = [at for path, *_, at in fake.requests if path == "/score"]
        waits = np.diff(times)
        assert waits.shape == (2,)
        assert (waits >= [0.1, 0.2]).all()


@pytest.mark.parametrize(("status", "requests", "level"), [
    (400, 1, "ERROR"), (404, 1, "ERROR"), (302, 1, "ERROR"), (429, 3, "WARNING"),
    (500, 3, "WARNING")])
def test_what_is_asked_again(status, requests, level, caplog):
    def answer(path, body):
        return (200, HEALTH) if path == "/health" else (status, {"error": "not\nso"})

    with Fake(answer) as fake, reward(fake, batch_size=16, retries=2) as asked:
        assert_right(submit(asked).result(60), valid=[False] * len(IDS))
        assert len(fake.bodies("/score")) == requests
    record, = caplog.records
    assert record.levelname == level
    assert f"status {status}: not so" in record.message


def test_another_version_is_told_and_kept(caplog):
    version = ["1"]

    def answer(path, body):
        return (200, HEALTH) if path == "/health" else (200, scored(body, version[0]))

    with Fake(answer) as fake, reward(fake) as asked:
        submit(asked).result(60)
        assert (asked.version, caplog.text) == ("1", "")
        version[0] = "2"
        for _ in range(2):
            assert_right(submit(asked).result(60))
        assert asked.version == "2"
    assert [r.message for r in caplog.records] == ["reward fake is now of version 2 and was of 1"]


def test_a_fault_of_the_reward_itself_is_not_hidden():
    class Broken:
        def health(self):
            return host.Health("broken", "1", ("good",))

        def score(self, samples):
            raise ZeroDivisionError

    with HostReward(Broken()) as asked, pytest.raises(ZeroDivisionError):
        submit(asked).result(60)


def test_callers_mistakes():
    with Fake(scorer()) as fake, reward(fake) as asked:
        with pytest.raises(ValueError, match="same id"):
            submit(asked, [1, 1])
        with pytest.raises(ValueError, match="not uint8"):
            submit(asked, images=pictures(IDS).astype(np.float32))
        with pytest.raises(ValueError, match="shorter"):
            submit(asked, prompts=["one"])
        assert fake.bodies("/score") == []


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://a", "http://", "http://a:b", "http://["])
def test_bad_addresses(url):
    with pytest.raises(InputError, match="not the address of a server; write http://host:port"):
        Connection(url)


@pytest.mark.parametrize("token", ["a\nb", "clé"])
def test_bad_tokens(token):
    with pytest.raises(InputError, match="must be one line of ASCII") as e:
        Connection("http://a", token=token)
    assert token not in str(e.value)
    assert "sesame" not in repr(Connection("http://a", token="sesame"))


def test_total():
    values = {"a": np.float32([1, 2]), "b": np.float32([3, 5])}
    found = host.total(values, {"a": 0.5, "b": 2})
    assert found.dtype == np.float32
    assert found.tolist() == [6.5, 11]
    with pytest.raises(InputError, match="no score 'c'; it has a, b"):
        host.total(values, {"c": 1})
