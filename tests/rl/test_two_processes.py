"""Two processes of four devices each reinforce like one of eight."""

import micro
import numpy as np
import processes
from conftest import ROOT
from short_runs import figures


def test_two_processes_and_one(blocks_model, tmp_path):
    arguments = [f"--config={ROOT}/tests/rl/bright.py", f"--config.model={blocks_model}",
                 "--config.steps=3"]
    processes.finish(processes.start(2, tmp_path / "two", *arguments, command="reinforce"))
    micro.finish(micro.start(tmp_path / "one", *arguments, devices=8, command="reinforce"))
    for name, most in (("reward", 1e-5), ("loss", 1e-5), ("grad_norm", 1e-4), ("kl", 1e-4)):
        one, other = (figures(tmp_path / n, name) for n in ("one", "two"))
        assert len(one) == 3
        np.testing.assert_allclose(other, one, rtol=most, atol=1e-7)
