"""What a run warns of, from the lines of its figures."""

import json
import logging

import numpy as np
import pytest

from unipic_jax.rl.advantage import diversity
from unipic_jax.rl.alarms import Alarms

GOOD = {"reward": 0.5, "diversity": 0.6, "collapsed": 0.1, "clip_above": 0.1, "clip_below": 0.1,
        "mismatch": 1e-4}


def said(caplog, lines, path):
    caplog.clear()
    alarms = Alarms(path)
    with caplog.at_level(logging.WARNING):
        for step, line in enumerate(lines):
            alarms({"step": step} | line)
    return [r.getMessage() for r in caplog.records]


def test_a_sound_run_is_quiet(caplog, tmp_path):
    lines = [GOOD | {"reward": 0.5 + i / 20, "diversity": 0.6 - i / 40} for i in range(9)]
    lines[4] |= {"edit/quality": 0.95, "loss": None}
    lines[8] |= {"edit/quality": 0.93, "diversity": None}
    assert said(caplog, lines, tmp_path / "none") == []


@pytest.mark.parametrize(("figure", "value", "text"), [
    ("diversity", 0.29, "differ by 0.290 where they differed by 0.600"),
    ("collapsed", 0.8, "all rewards are equal in 80% of the groups"),
    ("clip_above", 0.45, "55% of the ratios are clipped"),
    ("mismatch", 0.02, "differ by 0.02 in the log-probability")])
def test_each_thing_is_said_once(figure, value, text, caplog, tmp_path):
    lines = [GOOD] * 4 + [GOOD | {figure: value}] * 2
    (only,) = said(caplog, lines, tmp_path / "none")
    assert text in only
    assert only.startswith("step 4: ")


def test_quality_that_falls_while_the_reward_rises(caplog, tmp_path):
    lines = [GOOD | {"generate/quality": 0.95}, GOOD, GOOD, {"generate/quality": 0.8}]
    assert said(caplog, lines, tmp_path / "none") == []  # the reward has not risen
    lines[2] = GOOD | {"reward": 0.9}
    lines.append({"generate/quality": 0.8, "reward": 0.9})
    (only,) = said(caplog, lines, tmp_path / "none")
    assert "generate/quality of held-out scenes fell to 0.800 from 0.950" in only


def test_a_run_that_goes_on_remembers_how_it_began(caplog, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i} | GOOD) + "\n" for i in range(3)))
    (only,) = said(caplog, [GOOD | {"diversity": 0.2}], path)
    assert "differed by 0.600" in only
    assert said(caplog, [GOOD | {"diversity": 0.2}], tmp_path / "none") == []


def test_diversity_is_the_deviation_inside_groups():
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(12, 2, 3)).astype(np.float32), np.repeat(np.arange(3), 4)
    valid = np.ones(12, bool)
    valid[5] = False
    x[5] = np.nan
    want = [np.square(x[i] - x[(group == group[i]) & valid].mean(0)).mean()
            for i in np.flatnonzero(valid)]
    assert np.isclose(diversity(x, group, valid), np.sqrt(np.mean(want)), rtol=1e-6)
    same = np.repeat(x[:3], 4, 0)
    assert diversity(same, group, np.ones(12, bool)) == 0
