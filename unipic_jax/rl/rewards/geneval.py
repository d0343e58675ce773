"""GenEval (Ghosh et al. 2023): whether the objects that a detector finds are those of a prompt.

Metadata are as the benchmark publishes them: {"tag", "include": [{"class", "count", "color",
"position": [relation, index of an earlier clause]}], "exclude": [{"class", "count"}]}, with color,
position and exclude where there are any. The tags are single_object, two_object, counting, colors,
position and color_attr.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unipic_jax.core.errors import InputError
from unipic_jax.rl.rewards.host import Answer, BadAnswer, Health, Sample, Score
from unipic_jax.rl.rewards.http_client import Remote

NAMES = ("graded", "strict", "correct")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
SURE, SURE_TO_COUNT = 0.3, 0.9  # an object of less confidence is not there; the latter if counting
MOST_OBJECTS = 16  # of a class
APART = 0.1  # how much of both sizes an offset must exceed along an axis
MAINLY = 0.5  # how much of the offset must then be left along that axis


class Detection(NamedTuple):
    """An object that a detector has found."""

    label: str
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    score: float  # its confidence, in [0, 1]
    colour: str  # the nearest of the benchmark's ten


class Clause(NamedTuple):
    """So many objects of a class, with their colour, and where they are to those of another."""

    label: str
    count: int
    colour: str | None = None
    relation: str | None = None
    other: int = 0  # an earlier clause, of a relation


class Goal(NamedTuple):
    """What a picture has to have, and of what it must not have so many or more."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is from `b`, of RELATIONS: none, one, or two if it is diagonal.

    Along each axis the offset between the centres is shortened by a tenth of the sum of both
    sizes; what is left must be more than half of the whole offset's length.
    """
    left = []
    offsets = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in range(2)]
    for i, offset in enumerate(offsets):
        sizes = sum(abs(o.box[i + 2] - o.box[i]) for o in (a, b))
        left.append(math.copysign(max(abs(offset) - APART * sizes, 0), offset))
    length = math.hypot(*offsets)
    if max(map(abs, left)) < 1e-3:  # of a pixel
        return set()
    x, y = (part / length for part in left)
    holds = (x < -MAINLY, x > MAINLY, y < -MAINLY, y > MAINLY)
    return {relation for relation, there in zip(RELATIONS, holds) if there}


def evaluate(detections: Sequence[Detection], goal: Goal) -> dict[str, float]:
    """The three scores of a picture, by name, in [0, 1].

    correct is the benchmark's: 1 where there are at least as many of each class as the prompt
    says, the surest of them in its colour and place, and not as many as it excludes. strict is
    what Flow-GRPO trains on: exactly as many, and all of them so. graded is its partial credit,
    the mean of marks for each clause: 1 - |found - count| / count for the number of objects, the
    same for the number that have the colour, and 1 or 0 for the position; the last two are 0 where
    the number of objects is wrong. Unlike Flow-GRPO's it is never below 0, and 1 exactly where
    strict is: a position has one mark (there, a wrong one has a 0 and a 1), and a clause of
    `exclude` about another class than those included has one too, 1 or 0.
    """
    least = SURE_TO_COUNT if goal.tag == "counting" else SURE
    sure = sorted((d for d in detections if d.score > least), key=lambda d: -d.score)

    def found(label):
        return [d for d in sure if d.label == label][:MOST_OBJECTS]

    spared = [len(found(clause.label)) < clause.count for clause in goal.exclude]
    marks, exact, enough = [], [], []  # of all clauses; objects by clause, None where they fail
    for clause in goal.include:
        there = found(clause.label)
        here, right = _marks(clause, there, exact)
        marks += here
        exact.append(there if right else None)
        surest = there[:clause.count]
        _, right = _marks(clause, surest, enough)
        enough.append(surest if right else None)
    named = {clause.label for clause in goal.include}
    marks += [float(kept) for clause, kept in zip(goal.exclude, spared)
              if clause.label not in named]
    return {"graded": sum(marks) / len(marks),
            "strict": float(None not in exact and all(spared)),
            "correct": float(None not in enough and all(spared))}


def _marks(clause, objects, earlier) -> tuple[list[float], bool]:
    """The marks of a clause, and whether all of them are 1."""
    marks = [_near(len(objects), clause.count)]
    if clause.colour is not None:
        coloured = sum(o.colour == clause.colour for o in objects)
        marks.append(_near(coloured, clause.count) if marks[0] == 1 else 0.0)
    if clause.relation is not None:
        # As in the benchmark, a place is not looked at where the colour is wrong already.
        others = earlier[clause.other]
        marks.append(float(min(marks) == 1 and others is not None and all(
            clause.relation in relations(o, other) for o in objects for other in others)))
    return marks, min(marks) == 1


def _near(found, count) -> float:
    return max(0.0, 1 - abs(found - count) / count)


class GenEvalScorer(NamedTuple):
    """The scores of what a detector finds.

    The detector is a server as `wire` describes it, except that it is posted to at /detect, and
    answers for each sample {"id", "objects": [{"label", "box", "score", "colour"}]}.
    """

    detector: Remote

    def health(self) -> Health:
        found = self.detector.health()
        return Health("geneval", _version(found.version), NAMES)

    def score(self, samples: Sequence[Sample]) -> Answer:
        goals, wrong = {}, []
        for sample in samples:
            try:
                goals[sample.id] = read_goal(sample.metadata)
            except InputError as e:
                wrong.append(Score(sample.id, None, str(e)))
        good = [s for s in samples if s.id in goals]
        if not good:
            return Answer(self.health().version, wrong)
        version, entries = self.detector.ask("/detect", good)
        # Those of others are left to the check of all answers to find.
        return Answer(_version(version), wrong + [
            _score(e, goals[e["id"]]) if e["id"] in goals else Score(e["id"], None)
            for e in entries])


def _version(detector):
    return f"detector {detector}"


def _score(entry, goal) -> Score:
    if "error" in entry:
        return Score(entry["id"], None, str(entry["error"]))
    if not isinstance(entry.get("objects"), list):
        raise BadAnswer(f"no objects of sample {entry['id']}")
    return Score(entry["id"], evaluate([_detection(o) for o in entry["objects"]], goal))


def _detection(found) -> Detection:
    try:
        box = tuple(map(float, found["box"]))
        detection = Detection(found["label"], box, float(found["score"]), found["colour"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadAnswer("an object has no label, box, score and colour") from None
    if len(box) != 4 or not all(map(math.isfinite, (*box, detection.score))):
        raise BadAnswer(f"an object has the box {box} and the score {detection.score}")
    return detection


def read_goal(metadata: Mapping) -> Goal:
    """The goal that published metadata describe; InputError where they are malformed."""
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise InputError(f"GenEval has no tag {tag!r}; it has {', '.join(TAGS)}")
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        raise InputError("GenEval's metadata must include something, and list what it excludes")
    return Goal(tag, tuple(_clause(c, i) for i, c in enumerate(include)),
                tuple(_clause(c, 0) for c in exclude))


def _clause(found, earlier: int) -> Clause:
    try:
        clause = Clause(found["class"], found["count"], found.get("color"),
                        *found.get("position", ()))
    except (KeyError, TypeError, AttributeError):
        clause = None
    if not (clause and isinstance(clause.label, str) and type(clause.count) is int
            and clause.count > 0 and isinstance(clause.colour, str | None)
            and (clause.relation is None or (
                clause.relation in RELATIONS and type(clause.other) is int
                and 0 <= clause.other < earlier))):
        raise InputError(f"GenEval's metadata have the clause {found!r}, which is malformed")
    return clause
