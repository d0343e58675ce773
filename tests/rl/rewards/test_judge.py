"""The vision judge, against a server that speaks as OpenAI's does."""

import json

import numpy as np
import pytest
from fakes import Fake, pictures

from unipic_jax.core.errors import InputError
from unipic_jax.rl.rewards import judge, wire
from unipic_jax.rl.rewards.host import HostReward
from unipic_jax.rl.rewards.http_client import Connection

IDS = [5, 2, 9]
MODELS = {"object": "list", "data": [{"id": "other"}, {"id": "seer"}]}


def said(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def read(body):
    """(the pictures shown, the text) of the first message of a request."""
    assert body["model"] == "seer"
    *shown, text = body["messages"][0]["content"]
    assert body["messages"][0]["role"] == "user"
    assert text["type"] == "text"
    for part in shown:
        assert part["type"] == "image_url"
        assert part["image_url"]["url"].startswith("data:image/png;base64,")
    urls = [part["image_url"]["url"] for part in shown]
    return [wire.decode(url.partition(",")[2]) for url in urls], text["text"]


def talks(answer):
    """A server's answers: its models, and `answer(pictures, text, messages)` in a chat."""
    def answer_all(path, body):
        if path == "/v1/models":
            return 200, MODELS
        assert path == "/v1/chat/completions"
        found = answer(*read(body), body["messages"])
        return found if isinstance(found, tuple) else said(found)
    return answer_all


def judged(fake, *, references=None, ids=IDS, **more):
    model = judge.Judge(Connection(fake.url + "/v1", backoff=0.01, retries=1, **more), "seer")
    with HostReward(model, batch_size=1, concurrency=2) as asked:
        assert asked.version.startswith("seer ")
        return asked.submit(pictures(ids), [f'draw "{i}"\n{{x}}' for i in ids], [{}] * len(ids),
                            references, ids).result(60)


def id_of(picture) -> int:
    return next(i for i in IDS if np.array_equal(picture, pictures([i])[0]))


def test_drawn_pictures():
    """The text and the picture for the first question, the picture alone for the second."""
    def answer(shown, text, _):
        drawn, = shown
        if "match" not in text:
            assert "draw" not in text
            return json.dumps({"reason": "", "natural": 9, "clean": 4})
        assert json.dumps(f'draw "{id_of(drawn)}"\n{{x}}') in text
        return f'```json\n{{"reason": "so {{1}}", "match": {id_of(drawn)}}}\n```'

    with Fake(talks(answer)) as fake:
        values, valid = judged(fake, token="secret\n")
        assert {headers["Authorization"] for *_, headers, _ in fake.requests} == {"Bearer secret"}
        assert len(fake.bodies("/v1/chat/completions")) == 2 * len(IDS)
    assert valid.all()
    match = np.float64(IDS) / 10
    np.testing.assert_allclose(values["consistency"], match, rtol=1e-6)
    np.testing.assert_allclose(values["quality"], 0.4, rtol=1e-6)
    np.testing.assert_allclose(values["overall"], np.sqrt(match * 0.4), rtol=1e-6)


def test_edited_pictures():
    """Source and result in this order for the first question; the lower mark counts."""
    references = pictures([i + 100 for i in IDS])

    def answer(shown, text, _):
        if "followed" not in text:
            assert len(shown) == 1
            id_of(shown[0])
            return '{"natural": "7.5", "clean": 10}'
        source, result = shown
        assert np.array_equal(source, references[IDS.index(id_of(result))])
        assert json.dumps(f'draw "{id_of(result)}"\n{{x}}') in text
        return '{"followed": 8, "kept": 2}' if id_of(result) == 9 else '{"followed": 0, "kept": 5}'

    with Fake(talks(answer)) as fake:
        values, valid = judged(fake, references=references)
    assert valid.all()
    np.testing.assert_allclose(values["consistency"], [0, 0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(values["quality"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(values["overall"], [0, 0, np.sqrt(0.15)], rtol=1e-6)


def test_unreadable_answers_are_asked_for_once_more_and_then_not_valid(caplog):
    """5 mends its answer, 2 never does, 9 refuses to say anything on quality."""
    def answer(shown, text, messages):
        id, again = id_of(shown[-1]), len(messages) > 1
        if again:
            assert [m["role"] for m in messages] == ["user", "assistant", "user"]
            assert messages[1]["content"] in ("Looks good: 8/10!", "")
        if "match" in text:
            if id == 2 or (id == 5 and not again):
                return "Looks good: 8/10!"
            return '{"match": 10}'
        return None if id == 9 else '{"natural": 10, "clean": 10}'

    with Fake(talks(answer)) as fake:
        values, valid = judged(fake)
        assert len(fake.bodies("/v1/chat/completions")) == 3 + 2 + 3
    assert valid.tolist() == [True, False, False]
    assert values["overall"].tolist() == [1, 0, 0]
    assert caplog.text.count("seer does not give the marks match") == 1


@pytest.mark.parametrize("answer", [
    (200, {"choices": []}), (200, {"choices": [{"message": {"content": [1]}}]}), (200, {}),
    (400, {"error": {"message": "no pictures,\nplease"}}), (500, {"error": {"message": "down"}})])
def test_failing_servers(answer, caplog):
    with Fake(talks(lambda *_: answer)) as fake:
        assert not judged(fake).valid.any()
    record, = caplog.records
    assert "3 of 3 samples" in record.message
    assert "\n" not in record.message
    if answer[0] != 200:
        assert f"status {answer[0]}: {answer[1]['error']['message'].split()[0]}" in record.message


@pytest.mark.parametrize(("answer", "message"), [
    ((200, {"data": [{"id": "other"}]}), "has no model seer; it has other"),
    ((200, {}), "has no model seer; it has none"),
    ((401, {"error": {"message": "Incorrect API key"}}), "status 401: Incorrect API key")])
def test_a_judge_that_is_not_there_is_refused(answer, message):
    with Fake(lambda path, body: answer) as fake, pytest.raises(InputError, match=message):
        judged(fake)


@pytest.mark.parametrize(("text", "marks"), [
    ('{"a": 1, "b": 9.5}', [1, 9.5]),
    ('<think>maybe {"a": 3, "b": 3}? {no}</think> So:\n{"b": 2, "a": "4", "reason": "{"} end',
     [4, 2]),
    ('{"a": 7, "b": 8} or rather {"a": 11, "b": 8}', [7, 8]),
    ('{"a": 7', None), ("", None), ("7 and 8", None), ('{"a": 7}', None), ("[7, 8]", None),
    ('{"a": true, "b": 1}', None), ('{"a": -1, "b": 1}', None), ('{"a": NaN, "b": 1}', None),
    ('{"a": 1, "b": null}', None), ('{"a": 1, "b": "8/10"}', None), ('{"a": [1], "b": 1}', None),
    ("{" * 10_000, None), ('{"x":' * 3000, None)])
def test_read_marks(text, marks):
    assert judge.read_marks(text, ("a", "b")) == marks


def test_the_version_follows_the_questions(monkeypatch):
    one = judge.Judge(Connection("http://a"), "seer")
    before = one.version
    assert judge.Judge(Connection("http://b"), "seer").version == before
    assert judge.Judge(Connection("http://a"), "seen").version != before
    monkeypatch.setattr(judge, "QUALITY", judge.Question("Is it nice?", ("nice",)))
    assert one.version != before
