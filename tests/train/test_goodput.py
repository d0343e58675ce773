import time

import pytest

from unipic_jax.train.goodput import Goodput


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now - 500)


def test_time_in_steps_over_all_time_since_the_first_launch(monkeypatch):
    clock = Clock(monkeypatch)
    run = Goodput()
    clock.now += 10  # compiling
    for _ in range(3):
        with run.step():
            clock.now += 5
        clock.now += 1  # waiting for data
    assert run.share == pytest.approx(15 / 28)
    kept = run.kept
    with run.step():  # lost, for the run is cut off before it is saved again
        clock.now += 5

    clock.now += 67  # waiting for another machine
    again = Goodput(**kept)
    assert again.share == pytest.approx(15 / 100)
    with again.step():
        clock.now += 100
    assert again.share == pytest.approx(115 / 200)
