"""Rewards outside of the jitted program: pictures go out, and scores come back by sample.

A `Scorer` scores some samples, wherever it does so. `HostReward` makes of it what training needs:
it asks for many at once, matches answers to samples by their ids, checks them, and gives a mask
instead of a score where there is none. A reward that fails neither stops a run nor teaches it.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from unipic_jax.core.errors import InputError

LARGEST = float(np.finfo(np.float32).max)

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """There is no answer: nothing listens, it broke off, is overloaded, or takes too long."""


class BadAnswer(Exception):
    """There is an answer that cannot be used; the message says why."""


class Sample(NamedTuple):
    """A picture to be scored."""

    id: int  # its global index, which its score comes back with
    image: np.ndarray  # uint8 [H, W, 3]
    prompt: str
    metadata: dict  # what the reward has to know besides, of what JSON has
    reference: np.ndarray | None = None  # uint8 [h, w, 3], of an edit


class Score(NamedTuple):
    """What a sample has got, or why it could not be scored."""

    id: int
    values: dict[str, float] | None
    error: str = ""


class Health(NamedTuple):
    """Who a scorer is: a changed version means that scores cannot be compared."""

    name: str
    version: str
    scores: tuple[str, ...]  # the names of the values of a score


class Answer(NamedTuple):
    """Scores in any order, one for each sample, and the version that they are of."""

    version: str
    scores: list[Score]


class Scorer(Protocol):
    """What scores samples. Both raise Unavailable and BadAnswer, and are called by threads."""

    def health(self) -> Health: ...

    def score(self, samples: Sequence[Sample]) -> Answer: ...


class Scores(NamedTuple):
    """Scores of n samples in the order in which they were given."""

    values: dict[str, np.ndarray]  # float32 [n], 0 where not valid
    valid: np.ndarray  # bool [n]


class HostReward:
    """A scorer for training; made before the first step, for that is when it is asked who it is.

    `name`, `version` and `names` (of the scores) are what it says; `version` belongs into
    checkpoints, and follows a server that comes back as another one, with a warning. Raises
    InputError where the scorer does not answer.
    """

    def __init__(self, scorer: Scorer, *, batch_size: int = 16, concurrency: int = 8):
        if batch_size < 1 or concurrency < 1:
            raise InputError("batch size and concurrency of a reward must be at least 1")
        try:
            self.name, self.version, self.names = scorer.health()
        except (Unavailable, BadAnswer) as e:
            raise InputError(f"the reward is not ready: {e}; start it before training") from None
        self._scorer, self._batch_size = scorer, batch_size
        self._requests = ThreadPoolExecutor(concurrency, "reward")
        # One thread joins the answers, in the order of the calls; what follows is its alone.
        self._joiner = ThreadPoolExecutor(1, "reward-join")
        self._fault, self._left_out, self._warned = None, 0, False

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict],
        ref_images: Sequence[np.ndarray] | None, sample_ids: Sequence[int],
    ) -> Future[Scores]:
        """Ask for the scores of images uint8 [n, H, W, 3]; the arrays must not change meanwhile.

        A sample is not valid where its request got no answer, or one that is not to be trusted:
        malformed, of other samples or too many or few, or with a value that is not finite. The
        log says so once, and again when answers are good again. An edit's `ref_images` may
        differ in size; ids must differ.
        """
        ids = [int(i) for i in sample_ids]
        references = [None] * len(ids) if ref_images is None else ref_images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype}{images.shape}, not uint8 [n, H, W, 3]")
        if len(set(ids)) != len(ids):
            raise ValueError("two samples have the same id")
        samples = [Sample(*fields) for fields in zip(
            ids, images, prompts, metadata, references, strict=True)]
        parts = [self._requests.submit(self._request, samples[i:i + self._batch_size])
                 for i in range(0, len(samples), self._batch_size)]
        return self._joiner.submit(self._join, ids, parts)

    def _request(self, samples) -> Answer | Unavailable | BadAnswer:
        try:
            answer = self._scorer.score(samples)
            check(answer.scores, [s.id for s in samples], self.names)
        except (Unavailable, BadAnswer) as e:
            return e
        return answer

    def _join(self, ids, parts) -> Scores:
        row = {id: i for i, id in enumerate(ids)}
        values = {name: np.zeros(len(ids), np.float32) for name in self.names}
        valid = np.zeros(len(ids), bool)
        faults, errors = [], []
        for answer in (part.result() for part in parts):
            if isinstance(answer, Exception):
                faults.append(answer)
                continue
            if answer.version != self.version:
                log.warning("reward %s is now of version %s and was of %s", self.name,
                            answer.version, self.version)
                self.version = answer.version
            for score in answer.scores:
                if score.values is None:
                    errors.append(score.error)
                    continue
                valid[row[score.id]] = True
                for name in self.names:
                    values[name][row[score.id]] = score.values[name]
        if ids:
            self._report(faults, errors, valid)
        return Scores(values, valid)

    def _report(self, faults, errors, valid):
        missing = int((~valid).sum())
        if faults:
            if type(faults[0]) is not self._fault:
                level = logging.ERROR if isinstance(faults[0], BadAnswer) else logging.WARNING
                log.log(level, "reward %s: %d of %d samples have no score and are left out, and so "
                        "are those to come until it recovers: %s", self.name, missing, len(valid),
                        faults[0])
            self._fault = type(faults[0])
            self._left_out += missing
        elif self._fault:
            log.info("reward %s is back; %d samples were left out", self.name, self._left_out)
            self._fault, self._left_out = None, 0
        if errors and not self._warned:
            log.warning("reward %s cannot score some samples, which are left out: %s", self.name,
                        errors[0])
            self._warned = True

    def close(self):
        """Give up what is asked for, and take no more."""
        for pool in (self._requests, self._joiner):
            pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def check(scores: Sequence[Score], ids: Sequence[int], names: Sequence[str]) -> None:
    """Raises BadAnswer unless there is one score for each id, and each has all of the names and
    finite numbers for them."""
    if len(scores) != len(ids):
        raise BadAnswer(f"{len(scores)} scores for {len(ids)} samples")
    found = {score.id for score in scores}
    if unknown := found - set(ids):
        raise BadAnswer(f"a score of sample {min(unknown)}, which was not asked for")
    if len(found) != len(ids):
        raise BadAnswer("two scores of one sample")
    for score in scores:
        for name in names if score.values is not None else ():
            value = score.values.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadAnswer(f"no number for {name} of sample {score.id}")
            if not abs(value) <= LARGEST:  # nor is NaN
                raise BadAnswer(f"{name} of sample {score.id} is {value!s:.20}")


def total(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The weighted sum float32 [n] of scores by name; InputError for a name that is not there."""
    if unknown := sorted(weights.keys() - values.keys()):
        raise InputError(f"the reward has no score {unknown[0]!r}; it has {', '.join(values)}")
    return sum(np.float32(weight) * values[name] for name, weight in weights.items())
