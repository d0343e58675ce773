"""Several processes, eight devices in all, reinforce like one of eight."""

import jax
import micro
import numpy as np
import processes
import pytest
from conftest import ROOT
from short_runs import figures, flat

STEPS = 6
CLOSE = {"reward": 1e-5, "loss": 1e-5, "grad_norm": 1e-4, "kl": 1e-4}


@pytest.fixture(scope="module")
def arguments(blocks_model):
    return [f"--config={ROOT}/tests/rl/bright.py", f"--config.model={blocks_model}",
            f"--config.steps={STEPS}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, arguments):
    """A run of two processes, one of four and one of one."""
    root = tmp_path_factory.mktemp("processes")
    for count, name in ((2, "two"), (4, "four")):
        processes.finish(processes.start(count, root / name, *arguments, command="reinforce"))
    micro.finish(micro.start(root / "one", *arguments, devices=8, command="reinforce"))
    return root


@pytest.mark.parametrize("name", ["two", "four"])
def test_figures_are_the_same(runs, name):
    for figure, most in CLOSE.items():
        one, other = (figures(runs / n, figure) for n in ("one", name))
        assert len(one) == STEPS
        np.testing.assert_allclose(other, one, rtol=most, atol=1e-7)


def test_one_of_two_is_killed(runs, arguments, tmp_path):
    """The other stops when it misses its heartbeat, and the same command ends with the same bits
    as the run that nothing has broken."""
    processes.kill_one(tmp_path / "run", *arguments, command="reinforce",
                       when=(tmp_path / "run/checkpoints/2").exists)
    said, _ = processes.finish(
        processes.start(2, tmp_path / "run", *arguments, command="reinforce"))
    assert "goes on from step" in said
    jax.tree.map(np.testing.assert_array_equal, flat(tmp_path / "run"), flat(runs / "two"))
    assert figures(tmp_path / "run", "reward") == figures(runs / "two", "reward")
