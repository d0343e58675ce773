"""GenEval's rules on detections, and its scorer with a detector on a socket."""

import numpy as np
import pytest
from fakes import Fake, pictures

from unipic_jax.core.errors import InputError
from unipic_jax.rl.rewards import geneval
from unipic_jax.rl.rewards.geneval import Detection
from unipic_jax.rl.rewards.host import HostReward
from unipic_jax.rl.rewards.http_client import Connection, Remote


def seen(label, x=50, y=50, colour="red", score=0.95, size=20):
    """A square object around (x, y)."""
    half = size / 2
    return Detection(label, (x - half, y - half, x + half, y + half), score, colour)


ONE = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
TWO = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
THREE = {"tag": "counting", "include": [{"class": "cat", "count": 3}],
         "exclude": [{"class": "cat", "count": 4}]}
RED = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
LEFT = {"tag": "position", "include": [
    {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
BOTH = {"tag": "color_attr", "include": [
    {"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}
cat, dog = seen("cat"), seen("dog", 150)
blue_cat, blue_dog = cat._replace(colour="blue"), dog._replace(colour="blue")


@pytest.mark.parametrize(("metadata", "detections", "graded", "strict", "correct"), [
    (ONE, [cat], 1, 1, 1),
    (ONE, [cat, dog, dog], 1, 1, 1),  # others do not matter
    (ONE, [], 0, 0, 0),
    (ONE, [dog], 0, 0, 0),
    (ONE, [cat, cat], 0, 0, 1),  # at least one is enough for the benchmark
    (ONE, [cat._replace(score=0.3)], 0, 0, 0),
    (ONE, [cat._replace(score=0.31)], 1, 1, 1),
    (TWO, [cat, dog], 1, 1, 1),
    (TWO, [cat], 1 / 2, 0, 0),
    (TWO, [cat, cat, dog], 1 / 2, 0, 1),
    (THREE, [cat] * 3, 1, 1, 1),
    (THREE, [cat] * 2, 2 / 3, 0, 0),
    (THREE, [cat] * 4, 2 / 3, 0, 0),
    (THREE, [cat] * 9, 0, 0, 0),  # and not below 0
    (THREE, [cat] * 3 + [cat._replace(score=0.9)], 1, 1, 1),  # only what is sure is counted
    (RED, [cat], 1, 1, 1),
    (RED, [blue_cat], 1 / 2, 0, 0),
    (RED, [], 0, 0, 0),
    (RED, [cat, blue_cat._replace(score=0.5)], 0, 0, 1),  # the surest one is red
    (RED, [cat._replace(score=0.5), blue_cat], 0, 0, 0),
    (LEFT, [dog, cat], 1, 1, 1),
    (LEFT, [dog, seen("cat", 250)], 2 / 3, 0, 0),
    (LEFT, [dog, seen("cat", 150, 50)], 2 / 3, 0, 0),  # in the same place
    (LEFT, [cat], 1 / 3, 0, 0),
    (LEFT, [dog], 1 / 3, 0, 0),
    (LEFT, [dog, cat, seen("cat", 250, score=0.5)], 1 / 3, 0, 1),
    (LEFT, [dog, seen("cat", 250), cat._replace(score=0.5)], 1 / 3, 0, 0),
    (BOTH, [cat, blue_dog], 1, 1, 1),
    (BOTH, [blue_cat, dog], 1 / 2, 0, 0),  # the colours exchanged
    (BOTH, [cat, dog], 3 / 4, 0, 0),
    (BOTH, [cat], 1 / 2, 0, 0),
    (ONE | {"exclude": [{"class": "dog", "count": 2}]}, [cat, dog], 1, 1, 1),
    (ONE | {"exclude": [{"class": "dog", "count": 2}]}, [cat, dog, dog], 1 / 2, 0, 0),
])
def test_rules(metadata, detections, graded, strict, correct):
    found = geneval.evaluate(detections, geneval.read_goal(metadata))
    assert found == pytest.approx({"graded": graded, "strict": strict, "correct": correct})
    assert (found["graded"] == 1) == (found["strict"] == 1)


@pytest.mark.parametrize(("offset", "found"), [
    ((-100, 0), {"left of"}), ((100, 0), {"right of"}), ((0, -100), {"above"}),
    ((0, 100), {"below"}), ((100, 100), {"right of", "below"}), ((0, 0), set()),
    ((-4, 0), set()),  # a tenth of both sizes
    ((-7, 0), set()), ((-9, 0), {"left of"}),  # (7 - 4) / 7 is less than half, (9 - 4) / 9 more
    ((-100, 60), {"left of"}),  # (60 - 4) / 116.6 is less than half
    ((-100, 70), {"left of", "below"})])
def test_relations(offset, found):
    """Both are 20 pixels wide and high, so that 4 pixels of an offset do not count."""
    a, b = seen("a", 200 + offset[0], 200 + offset[1]), seen("b", 200, 200)
    assert geneval.relations(a, b) == found


@pytest.mark.parametrize("relation", geneval.RELATIONS)
def test_a_relation_is_that_of_the_clause_to_the_other(relation):
    clauses = [{"class": "dog", "count": 1},
               {"class": "cat", "count": 1, "position": [relation, 0]}]
    goal = geneval.read_goal({"tag": "position", "include": clauses})
    places = {"left of": (50, 200), "right of": (350, 200), "above": (200, 50),
              "below": (200, 350)}
    for name, place in places.items():
        found = geneval.evaluate([seen("dog", 200, 200), seen("cat", *place)], goal)
        assert found["strict"] == found["correct"] == (name == relation)


@pytest.mark.parametrize("metadata", [
    {}, ONE | {"tag": "beauty"}, ONE | {"include": []}, ONE | {"include": [{"class": "cat"}]},
    ONE | {"include": [{"class": "cat", "count": 0}]}, ONE | {"include": ["cat"]},
    ONE | {"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},  # of itself
    LEFT | {"include": [LEFT["include"][0], LEFT["include"][1] | {"position": ["near", 0]}]},
    LEFT | {"include": [LEFT["include"][0], LEFT["include"][1] | {"position": ["left of", 0.0]}]},
    RED | {"include": [RED["include"][0] | {"color": ["red"]}]},
    ONE | {"exclude": 3}, ONE | {"exclude": [{"class": "dog"}]}])
def test_malformed_metadata(metadata):
    with pytest.raises(InputError, match="GenEval") as e:
        geneval.read_goal(metadata)
    assert "\n" not in str(e.value)


HEALTH = {"name": "detector", "version": "swin-s", "scores": []}
IDS = [4, 30, 2, 11]
SEEN = {4: [cat], 30: [blue_cat], 2: [], 11: [cat, blue_cat]}


def detector(change=lambda samples: samples):
    def answer(path, body):
        if path == "/health":
            return 200, HEALTH
        assert path == "/detect"
        found = [{"id": s["id"], "objects": [o._asdict() for o in SEEN[s["id"]]]}
                 for s in body["samples"]]
        return 200, {"version": "swin-s", "samples": change(found)}
    return answer


def scored(fake, metadata=[RED] * len(IDS)):
    remote = Remote(Connection(fake.url, retries=0))
    with HostReward(geneval.GenEvalScorer(remote), batch_size=2) as asked:
        assert (asked.name, asked.version) == ("geneval", "detector swin-s")
        return asked.submit(pictures(IDS), ["a cat"] * len(IDS), metadata, None, IDS).result(60)


def test_scores_of_a_detector():
    with Fake(detector(lambda samples: samples[::-1])) as fake:
        values, valid = scored(fake)
    assert valid.all()
    assert {name: row.tolist() for name, row in values.items()} == {
        "graded": [1, 0.5, 0, 0], "strict": [1, 0, 0, 0], "correct": [1, 0, 0, 1]}


def test_a_sample_without_a_goal(caplog):
    """It is not sent to the detector; that beside it is scored."""
    with Fake(detector()) as fake:
        values, valid = scored(fake, [{}, RED, {}, {}])
        sent = [s["id"] for body in fake.bodies("/detect") for s in body["samples"]]
    assert valid.tolist() == [False, True, False, False]
    assert values["graded"].tolist() == [0, 0.5, 0, 0]
    assert sent == [30]
    assert caplog.text.count("GenEval has no tag None") == 1


def changed(**changes):
    """Objects of sample 4 with changes."""
    def change(samples):
        for sample in samples:
            for found in sample["objects"] if sample["id"] == 4 else ():
                found |= changes
        return samples
    return change


@pytest.mark.parametrize(("change", "message"), [
    (changed(score=float("nan")), "the score nan"),
    (changed(box=[0, 1, 2]), "the box"),
    (changed(box=[0, 1, 2, float("inf")]), "the box"),
    (changed(box=None), "no label, box, score and colour"),
    (lambda samples: samples[1:] if samples[0]["id"] == 4 else samples, "1 scores for 2 samples"),
    (lambda samples: [s | {"id": 99} if s["id"] == 4 else s for s in samples], "sample 99"),
    (lambda samples: [{"id": s["id"]} if s["id"] == 4 else s for s in samples],
     "no objects of sample 4")])
def test_a_detector_that_is_not_to_be_trusted(change, message, caplog):
    with Fake(detector(change)) as fake:
        values, valid = scored(fake)
    assert valid.tolist() == [False, False, True, True]
    assert np.array_equal(values["correct"], [0, 0, 0, 1])
    record, = caplog.records
    assert record.levelname == "ERROR"
    assert message in record.message


def test_a_detector_that_refuses_a_picture_or_is_down(caplog):
    def refuse(samples):
        return [{"id": 4, "error": "blank"} if s["id"] == 4 else s for s in samples]

    fake = Fake(detector(refuse))
    assert scored(fake).valid.tolist() == [False, True, True, True]
    assert "blank" in caplog.text
    fake.stop()
    with pytest.raises(InputError, match=r"the reward is not ready: .*Connection refused"):
        scored(fake)
