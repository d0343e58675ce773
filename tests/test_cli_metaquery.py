"""The command line of the unified model: MetaQuery's pictures, and answers about pictures."""

import json
import shutil

import numpy as np
import pytest
from conftest import GOLDENS, relative
from test_cli import KONTEXT, SOURCE, error, replaced

from unipic_jax.cli import main

MLLM, CONDITIONER = (str(GOLDENS / "metaquery" / n) for n in ("qwen2_5_vl", "conditioner"))
METAQUERY = ["--model", KONTEXT, "--mllm", MLLM, "--conditioner", CONDITIONER]
DESCRIBE = ["describe", "--mllm", MLLM, "--image", SOURCE, "--prompt",
            "describe the image in detail", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Both folders in the JAX layout."""
    target = tmp_path_factory.mktemp("metaquery") / "jax"
    assert main(["convert", "--from", str(GOLDENS / "metaquery"), "--to", str(target)]) == 0
    return target


def test_pictures_equal_golden(copies, golden, meta, tmp_path):
    """From text in the released layout, and an edit in ours."""
    np.save(tmp_path / "noise.npy", golden["edit/posterior_noise"])
    h, w = map(str, meta["t2i_size_hw"])
    ours = ["--model", KONTEXT, "--mllm", str(copies / "qwen2_5_vl"), "--conditioner",
            str(copies / "conditioner")]
    for task, more in (("t2i", ["generate", *METAQUERY, "--prompt", meta["prompt"], "--height", h,
                                "--width", w]),
                       ("edit", ["edit", *ours, "--prompt", meta["edit_prompt"], "--image", SOURCE,
                                 "--image-size", str(meta["edit_image_size"]),
                                 "--reference-noise", str(tmp_path / "noise.npy")])):
        np.save(tmp_path / "init.npy", golden[f"metaquery_{task}/init_latents"])
        assert main([*more, "--steps", str(meta["steps"]), "--latents", str(tmp_path / "init.npy"),
                     "--save-latents", str(tmp_path / "last.npy"), "--output",
                     str(tmp_path / "out.png")]) == 0
        assert relative(np.load(tmp_path / "last.npy"), golden[f"metaquery_{task}/latent"]) < 1e-5


def test_every_turn_of_an_edit_is_kept(tmp_path):
    assert main(["edit", *METAQUERY, "--image", SOURCE, "--prompt", "a hat", "--prompt", "green",
                 "--image-size", "64", "--steps", "2", "--image-guidance-scale", "1.5",
                 "--three-axis-rope", "--newline-after-picture",
                 "--output", str(tmp_path / "out.png")]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["out-0.png", "out-1.png"]


def test_description_equals_golden(copies, golden, tmp_path, capfd):
    for folder in (MLLM, str(copies / "qwen2_5_vl")):
        args = replaced(DESCRIBE, "--mllm", folder)
        assert main([*args, "--save-tokens", str(tmp_path / "tokens.json")]) == 0
        tokens = json.loads((tmp_path / "tokens.json").read_text())
        assert tokens == golden["understand/small/generated"][0].tolist()
    out, err = capfd.readouterr()
    assert out.count("\n") >= 2
    assert "user" not in out
    assert "assistant" not in out
    assert "12 tokens, " in err
    assert err.splitlines()[-1].endswith("tokens a second")


def test_a_conversation_goes_on(tmp_path, capfd):
    assert main([*DESCRIBE, "--image", SOURCE, "--prompt", "and then?", "--temperature", "0.9",
                 "--max-pixels", "3136",
                 "--top-p", "0.8", "--repetition-penalty", "1.1", "--seed", "3"]) == 0
    err = capfd.readouterr().err
    assert err.count(" tokens") >= 2


@pytest.mark.parametrize(("name", "value", "message"), [
    ("--mllm", "nowhere", "nowhere is not a folder"),
    ("--mllm", KONTEXT, "has no config.json"),
    ("--mllm", KONTEXT + "/text_encoder", "is not a Qwen2.5-VL"),
    ("--image", "no.png", "no.png is missing"),
    ("--max-new-tokens", "0", "must be at least 1"),
])
def test_bad_questions_are_one_line(name, value, message, capfd):
    assert message in error(replaced(DESCRIBE, name, value), capfd)


def test_what_fits_nothing_is_one_line(tmp_path, capfd):
    assert "above 0" in error([*DESCRIBE, "--top-p", "2"], capfd)
    assert "--max-pixels must be at least" in error([*DESCRIBE, "--max-pixels", "9"], capfd)
    assert "is not a folder" in error([*DESCRIBE, "--save-tokens", "nowhere/a.json"], capfd)
    generate = ["generate", *METAQUERY, "--prompt", "a", "--height", "64", "--width", "64",
                "--output", tmp_path / "out.png"]
    assert "is not a folder" in error(replaced(generate, "--mllm", "nowhere"), capfd)
    assert "is not a Qwen2.5-VL" in error(replaced(generate, "--mllm", CONDITIONER), capfd)
    assert "is not a conditioner" in error(replaced(generate, "--conditioner", MLLM), capfd)
    at = generate.index("--mllm")
    assert "give --mllm" in error(generate[:at] + generate[at + 2:], capfd)
    edit = ["edit", "--model", KONTEXT, "--prompt", "a", "--image", SOURCE, "--three-axis-rope",
            "--output", tmp_path / "out.png"]
    assert "--three-axis-rope is for MetaQuery" in error(edit, capfd)
    folder = tmp_path / "qwen"
    shutil.copytree(MLLM, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are", "Be"))
    for args in (replaced(generate, "--mllm", folder), replaced(DESCRIBE, "--mllm", folder)):
        assert "is not the chat template of Qwen2.5-VL" in error(args, capfd)
    folder = tmp_path / "mute"
    shutil.copytree(MLLM, folder, ignore=shutil.ignore_patterns("tokenizer.json", "vocab.json"))
    assert "has no tokenizer" in error(replaced(DESCRIBE, "--mllm", folder), capfd)
    assert not list(tmp_path.glob("*.png"))
