"""Whole runs of reinforcement learning on the smallest model: its config, reward, and resuming."""

import contextlib
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from short_runs import figures, flat, make_config

from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.model import read_part
from unipic_jax.rl import loop, recipe
from unipic_jax.train import loop as train_loop
from unipic_jax.train.checkpoint import alone


@pytest.fixture
def model(blocks_model):
    return blocks_model


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    """A reward that pictures of random weights differ in; as blocks they cannot be read."""
    for task in recipe.REWARDS:
        monkeypatch.setitem(recipe.REWARDS[task], "graded",
                            lambda pictures, goal: pictures.mean((1, 2, 3)))


def test_a_stopped_run_ends_as_the_unbroken_one(model, tmp_path, monkeypatch):
    config = make_config(model, "edit", **{"rl.grpo.kl": 0.04, "lora.rank": 4})
    assert loop.reinforce(config, tmp_path / "whole", progress=False)

    @contextlib.contextmanager
    def stopping():
        yield lambda step: step == 2

    with monkeypatch.context() as m:
        m.setattr(train_loop, "stopping", stopping)
        assert not loop.reinforce(config, tmp_path / "parts", progress=False)
    assert loop.reinforce(config, tmp_path / "parts", progress=False)
    whole, parts = (flat(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    for name in ("reward", "loss", "grad_norm", "kl"):
        assert figures(tmp_path / "whole", name) == figures(tmp_path / "parts", name)
    # It has learned something, of rewards that differ, and moved away from the reference.
    start = traverse_util.flatten_dict(load.read(read_part(model / "transformer")))
    assert any(np.any(whole[k] != start[k]) for k in start)
    assert max(figures(tmp_path / "whole", "group_std")) > 0
    assert figures(tmp_path / "whole", "kl")[0] == 0
    assert figures(tmp_path / "whole", "kl")[-1] > 0
    assert (tmp_path / "whole/model/lora/transformer").is_dir()


def test_scores_that_a_kill_cut_off_are_made_again(model, tmp_path, monkeypatch):
    config = make_config(model, "edit", steps=1)
    scored = []

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train_loop.evaluate, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.reinforce(config, tmp_path, progress=False)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(train_loop.evaluate, "report", lambda *a: scored.append(a[-1]))
    assert loop.reinforce(config, tmp_path, progress=False)
    assert scored == [1]
    assert (tmp_path / "model").exists()


def test_the_folder_is_held_until_the_model_is_written(model, tmp_path, monkeypatch):
    held, write = [], loop.output.write

    def writing(*arguments):
        with pytest.raises(InputError, match="another run is in"), alone(tmp_path):
            pass
        held.append(write(*arguments))

    monkeypatch.setattr(loop.output, "write", writing)
    assert loop.reinforce(make_config(model, "edit", steps=1), tmp_path, progress=False)
    assert held
    with alone(tmp_path):
        assert (tmp_path / "model").exists()


def test_all_weights_and_a_copy_as_reference(model, tmp_path):
    config = make_config(model, "generate", **{"rl.grpo.kl": 0.04, "steps": 2,
                                               "rl.sampling.guidance_scale": 2.0})
    assert loop.reinforce(config, tmp_path / "run", progress=False)
    assert figures(tmp_path / "run", "kl")[0] == 0
    assert figures(tmp_path / "run", "kl")[1] > 0
    assert figures(tmp_path / "run", "ratio") == [1, 1]


def test_both_tasks_in_turn(model, tmp_path):
    assert loop.reinforce(make_config(model, "both", steps=3), tmp_path / "run", progress=False)
    lines = [set(line) for line in (json.loads(line) for line in (
        tmp_path / "run/metrics.jsonl").read_text().splitlines())]
    assert ["loss/edit" in line for line in lines] == [True, False, True]
    assert ["loss/generate" in line for line in lines] == [False, True, False]
    with Image.open(tmp_path / "run/reward.png") as picture:
        assert picture.size == (640, 320)


def test_captions_are_learned_and_edits_kept(model, tmp_path):
    def run(weight):
        config = make_config(model, "generate", **{
            "rl.objective": "nft", "rl.sampling.noise": 0.0, "rl.learn.keep": weight,
            "rl.kept.batch": 8})
        assert loop.reinforce(config, tmp_path / str(weight), progress=False)
        return figures(tmp_path / str(weight), "kept_kl")

    free, held = run(1e-6), run(1e2)
    assert free[0] == held[0] == 0
    assert 0 < held[-1] < free[-1] / 2
    with pytest.raises(InputError, match="keep holds edits"):
        loop.reinforce(make_config(model, "edit", **{"rl.learn.keep": 1.0}), tmp_path / "edit")
    config = make_config(model, "generate", **{
        "rl.learn.keep": 1.0, "rl.prompts": "captions.jsonl", "rl.server.url": "http://localhost"})
    with pytest.raises(InputError, match="needs edits to hold"):
        loop.reinforce(config, tmp_path / "file")


def test_fewer_prompts_than_devices(model, tmp_path, monkeypatch):
    """Two prompts on eight devices, each encoded by four, give what they give on two."""
    config = make_config(model, "edit", **{"rl.group": 8, "steps": 2})
    assert loop.reinforce(config, tmp_path / "many", progress=False)
    monkeypatch.setattr(train_loop, "open_mesh",
                        lambda _: meshes.make(devices=jax.devices()[:2]))
    assert loop.reinforce(config, tmp_path / "few", progress=False)
    for name in ("reward", "loss", "grad_norm", "group_std"):
        np.testing.assert_allclose(figures(tmp_path / "many", name),
                                   figures(tmp_path / "few", name), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("changes", "said"), [
    ({"rl.task": "describe"}, "rl.task 'describe': choose from edit, generate, both"),
    ({"rl.reward": {"judge": 1.0}}, "the reward of a judge needs its folder"),
    ({"rl.objective": "ppo"}, "rl.objective 'ppo': choose from grpo, nft"),
    ({"rl.group": 3}, "a batch of 16 does not divide into groups of 3"),
    ({"rl.learn.updates": 3}, "a batch of 16 does not divide into 3 updates of 1 micro-batches"),
    ({"trained": ("vae",)}, "reinforcement trains the transformer")])
def test_what_does_not_fit_is_said(model, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        loop.reinforce(make_config(model, "edit", **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_not_known(model, tmp_path):
    config = make_config(model, "edit")
    config.rl.reward["beauty"] = 1.0
    with pytest.raises(InputError, match=r"rl\.reward 'beauty': choose from graded, exact, judge"):
        loop.reinforce(config, tmp_path / "run", progress=False)
