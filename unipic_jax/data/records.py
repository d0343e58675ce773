"""What is learned from: one kind of example for every task."""

import dataclasses

import numpy as np

TASKS = ("generate", "edit", "describe")


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to draw from a caption, an edit to make, or a question to answer.

    Pictures are uint8 [H, W, 3].
    """

    name: str  # says in a log where it came from
    text: str  # the caption, the instruction or the question
    target: np.ndarray | None = None  # the picture to draw
    source: np.ndarray | None = None  # the picture that is edited or asked about
    answer: str | None = None

    @property
    def task(self) -> str:
        if self.answer is not None:
            return "describe"
        return "generate" if self.source is None else "edit"
