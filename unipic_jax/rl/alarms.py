"""Warnings from a run's own figures: of a hacked reward, and of a policy that breaks down."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIRST = 3  # rollouts whose mean the later ones are compared with
LEAST_DIVERSITY = 0.5  # of that of the first rollouts
LEAST_QUALITY = 0.9  # of that of the first evaluation
MOST_COLLAPSED = 0.75  # of the groups; of small ones half is usual
MOST_CLIPPED = 0.5  # of the samples
MOST_MISMATCH = 0.01  # of the log-probability as rollout and training have it, in the mean

log = logging.getLogger(__name__)


class Alarms:
    """Takes each line of metrics.jsonl, and warns of a thing once.

    `path` is that of the lines so far, of a run that goes on.
    """

    def __init__(self, path: Path):
        self._first: dict[str, list[float]] = {}
        self._said: set[str] = set()
        self._reward = None
        if path.exists():
            for line in path.read_text().splitlines():
                self._note(json.loads(line))

    def __call__(self, line: Mapping[str, Any]) -> None:
        self._note(line)
        for name, text in self._warnings(line):
            if name not in self._said:
                self._said.add(name)
                log.warning("step %d: %s", line["step"], text)

    def _note(self, line) -> None:
        if line.get("reward") is not None:
            self._reward = line["reward"]
        for name, value in line.items():
            if (name in ("diversity", "reward") or name.endswith("/quality")) and value is not None:
                known = self._first.setdefault(name, [])
                if len(known) < (1 if "/" in name else FIRST):
                    known.append(value)

    def _begin(self, name: str) -> float:
        return sum(self._first[name]) / len(self._first[name])

    def _warnings(self, line) -> Iterator[tuple[str, str]]:
        said = {name: value for name, value in line.items() if value is not None}
        if "diversity" in said and (
                said["diversity"] < LEAST_DIVERSITY * (begin := self._begin("diversity"))):
            yield "diversity", (
                f"the pictures of a group differ by {said['diversity']:.3f} where they differed by "
                f"{begin:.3f}: the policy draws one and the same; lower the learning rate, or "
                f"weigh the divergence from the start (kl) more")
        if said.get("collapsed", 0) > MOST_COLLAPSED:
            yield "collapsed", (
                f"all rewards are equal in {said['collapsed']:.0%} of the groups, from which "
                f"nothing is learned; take a finer reward, or prompts that are not solved")
        if (clipped := said.get("clip_above", 0) + said.get("clip_below", 0)) > MOST_CLIPPED:
            yield "clipped", (
                f"{clipped:.0%} of the ratios are clipped; lower the learning rate, or have fewer "
                f"updates a rollout")
        if said.get("mismatch", 0) > MOST_MISMATCH:
            yield "mismatch", (
                f"rollout and training differ by {said['mismatch']:.3g} in the log-probability; "
                f"compute in float32, or have one update a rollout")
        for name in said:
            if (name.endswith("/quality") and self._reward is not None and "reward" in self._first
                    and said[name] < LEAST_QUALITY * self._begin(name)
                    and self._reward > self._begin("reward")):
                yield name, (
                    f"{name} of held-out scenes fell to {said[name]:.3f} from "
                    f"{self._begin(name):.3f} while the reward rose to {self._reward:.3f}: "
                    f"the reward may be hacked; look at the samples")
