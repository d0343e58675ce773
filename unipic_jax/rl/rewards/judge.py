"""A vision language model as the judge, behind any server that speaks OpenAI's chat completions.

It is asked two questions in the manner of VIEScore (Ku et al. 2024): how well a picture is what
was asked for, and how well it is made. Each has marks from 0 to 10, of which the lowest counts,
and overall = sqrt(consistency * quality). Scores are in [0, 1].
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from unipic_jax.rl.rewards import wire
from unipic_jax.rl.rewards.host import Answer, BadAnswer, Health, Sample, Score
from unipic_jax.rl.rewards.http_client import Connection

NAMES = ("overall", "consistency", "quality")
BEST = 10  # of a mark
MOST_TOKENS = 1024  # of an answer
TRIES = 2  # at an answer that can be read


class Question(NamedTuple):
    """What is asked, before the form of the answer, and the marks that the answer must have."""

    text: str
    marks: tuple[str, ...]


DRAWN = Question("""\
A program was asked to draw a picture from a text. You see the picture. Judge only whether it
shows what the text says: the right things, as many of them, in their colours and places.
"match": 0 if it has nothing to do with the text, 10 if all that the text says is there.
""", ("match",))
EDITED = Question("""\
A program was asked to edit a picture. You see two pictures: first the one that it was given, then
the one that it has made of it. Judge two things apart from each other.
"followed": 0 if nothing of the instruction was done, 10 if all of it was.
"kept": 0 if the second picture is another one altogether, 10 if all that the instruction does not
speak of is as it was.
""", ("followed", "kept"))
QUALITY = Question("""\
A program has made the picture that you see. Judge only how well it is made, and not what is on it.
"natural": 0 if light, shadows, distances or proportions are quite wrong, 10 if nothing looks off.
"clean": 0 if it is full of distortions, blur, seams, noise or malformed bodies, 10 if it is free
of them.
""", ("natural", "clean"))
AGAIN = "That could not be read. Answer once more, with the JSON object and nothing else."


class Judge(NamedTuple):
    """The model `model` of a server whose address ends as the service has it (.../v1).

    The scores of a sample are two requests in turn; ask for many samples at once by a HostReward
    with a batch size of 1 and as many requests as the server likes. A sample whose answers cannot
    be read, after one repetition, has no score.
    """

    connection: Connection
    model: str

    @property
    def version(self) -> str:
        """The model, and a digest of the questions: other questions, other scores."""
        words = repr((DRAWN, EDITED, QUALITY, _form(DRAWN), AGAIN)).encode()
        return f"{self.model} {hashlib.blake2b(words, digest_size=4).hexdigest()}"

    def health(self) -> Health:
        models = self.connection.call("/models").get("data")
        known = [str(m.get("id")) for m in models if isinstance(m, dict)] if isinstance(
            models, list) else []
        if self.model not in known:
            raise BadAnswer(f"{self.connection.url} has no model {self.model}; it has "
                            f"{', '.join(known) or 'none'}")
        return Health("judge", self.version, NAMES)

    def score(self, samples: Sequence[Sample]) -> Answer:
        return Answer(self.version, [self._score(sample) for sample in samples])

    def _score(self, sample) -> Score:
        picture = wire.encode(sample.image)
        if sample.reference is None:
            asked, shown, what = DRAWN, [picture], "text"
        else:
            asked, shown, what = EDITED, [wire.encode(sample.reference), picture], "instruction"
        told = f"The {what} is: {json.dumps(sample.prompt, ensure_ascii=False)}\n"
        marks = []
        for question, pictures, more in ((asked, shown, told), (QUALITY, [picture], "")):
            found = self._ask(question, pictures, more)
            if found is None:
                return Score(sample.id, None, f"{self.model} does not give the marks "
                                              f"{', '.join(question.marks)}")
            marks.append(min(found) / BEST)
        consistency, quality = marks
        return Score(sample.id, dict(zip(NAMES, (
            math.sqrt(consistency * quality), consistency, quality))))

    def _ask(self, question, pictures, more) -> list[float] | None:
        messages = [{"role": "user", "content": [
            *({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
              for picture in pictures),
            {"type": "text", "text": question.text + more + _form(question)}]}]
        for _ in range(TRIES):
            found = self.connection.call("/chat/completions", {
                "model": self.model, "messages": messages, "temperature": 0,
                "max_tokens": MOST_TOKENS})
            try:
                text = found["choices"][0]["message"]["content"] or ""  # null is a refusal
                marks = read_marks(text, question.marks)
            except (LookupError, TypeError, AttributeError):
                raise BadAnswer(f"{self.connection.url} answers without a message") from None
            if marks is not None:
                return marks
            messages = [*messages, {"role": "assistant", "content": text},
                        {"role": "user", "content": AGAIN}]
        return None


def _form(question) -> str:
    marks = ", ".join(f'"{mark}": <0 to {BEST}>' for mark in question.marks)
    return (f"Be strict, and use the whole range from 0 to {BEST}. Answer with one JSON object "
            f'and nothing else: {{"reason": "<one short sentence>", {marks}}}')


def read_marks(text: str, names: Sequence[str]) -> list[float] | None:
    """The marks in a text: those of the last JSON object in it that has a number from 0 to 10, or
    the string of one, for each name, whatever is around it. None where there is no such object."""
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:  # nothing that was asked for is so deep
            break
        except ValueError:
            end = at + 1
        else:
            marks = [_mark(value.get(name)) for name in names]
            found = found if None in marks else marks
        at = text.find("{", end)
    return found


def _mark(value) -> float | None:
    try:
        mark = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return mark if 0 <= mark <= BEST else None
