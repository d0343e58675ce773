"""The judge of edits: its inputs, its training, and its reward in a run."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from short_runs import figures, make_config

from unipic_jax.cli import main
from unipic_jax.conditioning import judging, qwen_chat, qwen_images
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks, shards
from unipic_jax.models import edit_judge
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language, rope
from unipic_jax.rl import loop as rl_loop
from unipic_jax.rl import scored
from unipic_jax.train import evaluate, stage
from unipic_jax.train import loop as train_loop
from unipic_jax.train.config import nano


@pytest.fixture(scope="module")
def folders(blocks_model):
    """The smallest language model, and the folder of the head's config."""
    return blocks_model.parent / "metaquery/qwen2_5_vl", blocks_model.parent


@pytest.fixture(scope="module")
def data(blocks_model, tmp_path_factory):
    """A few edits by the model of random weights, scored."""
    root = tmp_path_factory.mktemp("scored")
    scored.write(str(blocks_model), 96, root / "train", progress=False)
    scored.write(str(blocks_model), 64, root / "held", held_out=True, progress=False)
    return root


def test_patches_are_those_of_the_host():
    cfg = qwen_images.Config(min_pixels=28 * 28, max_pixels=56 * 56)
    rng = np.random.default_rng(0)
    smooth = [np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC)) for _ in range(2)]
    want = [qwen_images.preprocess(cfg, [Image.fromarray(p)]) for p in smooth]
    size = qwen_images.smart_resize(cfg, 48, 64)
    found = qwen_images.patches(cfg, jnp.asarray(np.stack(smooth) / 255), size)
    level = 1 / 255 / min(cfg.image_std)
    for ours, (theirs, grid) in zip(found, want, strict=True):
        assert grid.tolist() == [[1, size[0] // 14, size[1] // 14]]
        assert ours.shape == theirs.shape
        # PIL rounds between the rows' pass and the columns', too: a level of 256 here and there.
        np.testing.assert_allclose(ours, theirs, atol=1.01 * level)
        assert np.abs(np.asarray(ours) - theirs).mean() < 0.3 * level


def test_its_states_are_those_of_the_chat(folders):
    """Against the chat with both pictures as the host prepares it, of a size that needs no other,
    for resizing rounds differently (`test_patches_are_those_of_the_host`)."""
    here = stage.open_judge(*folders)
    part, head = here["mllm"], here["judge"]
    params = {n: stage.params.init(p.specs, jax.random.key(i))
              for i, (n, p) in enumerate(here.items())}
    chat, found = qwen_chat.open_chat(part.folder), blocks.evaluation("edit", 1)
    side, _ = qwen_images.smart_resize(chat.images, 48, 48)
    before, after = (np.stack([np.asarray(Image.fromarray(p).resize((side, side)))
                               for p in pictures]) for pictures in (found.source, found.target))
    asked = judging.prepare(chat, part.config, found.text, (side, side), 24)
    score = judging.apply(chat.images, part.config, head.config, params["mllm"], params["judge"],
                          asked, before / 255, after / 255)
    chats = [[{"role": "user", "content": [
        *({"type": "image", "image": Image.fromarray(p)} for p in pair),
        {"type": "text", "text": text}]}]
        for *pair, text in zip(before, after, found.text)]
    read = qwen_chat.read(chat, part.config, chats)
    x = qwen.embed(part.config, params["mllm"], read.ids, read.pictures, jnp.float32)
    positions, _ = rope.picture_positions(part.config, read.ids, read.grids, read.mask)
    states, _ = language.apply(part.config, params["mllm"], x, positions, read.mask)
    want = edit_judge.apply(head.config, params["judge"], states, read.mask)
    np.testing.assert_allclose(score, want, rtol=1e-4, atol=1e-5)
    assert np.std(want) > 0.02
    last = states[0, int(read.mask[0].sum()) - 1]
    by_hand = last @ params["judge"]["score"]["kernel"] + params["judge"]["score"]["bias"]
    np.testing.assert_allclose(want[0], by_hand[0], rtol=1e-5)


def test_scored_edits(data):
    source = shards.Shards(str(data / "train"))
    examples = [source[i] for i in range(len(source))]
    assert len(examples) == 96
    scores = np.array([float(e.answer) for e in examples])
    assert ((scores >= 0) & (scores <= 1)).all()
    for e in examples:
        if np.array_equal(e.source, e.target):
            assert float(e.answer) == 0.25
    assert (scores == 1).any()  # true targets
    held = shards.Shards(str(data / "held"))
    assert {held[i].name for i in range(64)}.isdisjoint(e.name for e in examples)


def train(folders, data, target, **changes):
    config = nano()
    config.objective, config.trained, config.fresh = "judgement", ("mllm", "judge"), ("judge",)
    config.mllm, config.judge = map(str, folders)
    config.data.sources.scored = {"kind": "shards", "path": str(data / "train"), "weight": 1.0}
    config.samples.judged = str(data / "held")
    config.batch, config.steps, config.log_every = 16, 30, 10
    config.update_from_flattened_dict(changes)
    assert train_loop.train(config, target, progress=False)
    return target


def test_it_learns_and_then_rewards(folders, data, blocks_model, tmp_path):
    run = train(folders, data, tmp_path / "judge")
    assert figures(run, "loss")[-1] < 0.5 * figures(run, "loss")[0]
    opened = stage.open_judge(run / "model", run / "model")
    assert opened["judge"].config.hidden_size == 64
    config = make_config(blocks_model, "edit", steps=2, judge=str(run / "model"), **{
        "rl.reward": {"judge": 1.0}})
    assert rl_loop.reinforce(config, tmp_path / "rl", progress=False)
    assert max(figures(tmp_path / "rl", "group_std")) > 0
    assert np.isfinite(figures(tmp_path / "rl", "reward")).all()


def test_what_cannot_be_scored_is_said(tmp_path, capsys):
    for more in (["--model", "nano", "--count", "0"], ["--model", "nowhere", "--count", "1"]):
        assert main(["scored-edits", *more, "--to", str(tmp_path / "to")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unipic")]
    assert said == ["unipic: --count must be at least 1",
                    "unipic: nowhere is not a folder; give a path or hf://owner/name"]
    assert not (tmp_path / "to").exists()


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.integers(0, 6, 40), rng.normal(size=40)
        assert evaluate.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_a_head_that_does_not_fit(folders):
    with pytest.raises(InputError, match="its hidden_size is 128 where 64 is needed"):
        stage.open_judge(folders[0], micro.NANO)
    with pytest.raises(InputError, match="judge is missing"):
        stage.open_judge(folders[0], folders[0])
