"""How much of a run's time goes into its steps."""

import contextlib
import time


class Goodput:
    """Seconds in steps over seconds since the run was first launched.

    What a run is stopped, waits, starts, compiles, evaluates or does again after it was cut off
    lowers it: `kept` goes into checkpoints, so that the steps that are lost with the time since
    the last one do not count.
    """

    def __init__(self, launched: float | None = None, in_steps: float = 0.0):
        self.launched = time.time() if launched is None else launched  # since 1970
        self.in_steps = in_steps

    @contextlib.contextmanager
    def step(self):
        """Time in here is a step's."""
        began = time.monotonic()
        yield
        self.in_steps += time.monotonic() - began

    @property
    def share(self) -> float:
        return self.in_steps / max(time.time() - self.launched, 1e-9)

    @property
    def kept(self) -> dict[str, float]:
        """Its arguments in the next process of the run."""
        return {"launched": self.launched, "in_steps": self.in_steps}
