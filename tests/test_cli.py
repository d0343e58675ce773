"""The command line: results, one-line errors, exit codes, nothing half-written."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDENS, first, last, relative
from PIL import Image

from unipic_jax.cli import main

KONTEXT, SOURCE = str(GOLDENS / "kontext"), str(GOLDENS / "source.png")


@pytest.fixture
def small(golden, tmp_path):
    """Arguments of a small picture, with the golden latents to begin with."""
    np.save(tmp_path / "x.npy", golden["kontext_t2i/init_latents"])
    return ["generate", "--model", KONTEXT, "--prompt", "a red square", "--height", "64",
            "--width", "48", "--steps", "2", "--latents", str(tmp_path / "x.npy"),
            "--output", str(tmp_path / "out.png")]


def test_generate_and_edit_equal_golden(golden, meta, tmp_path, capfd):
    np.save(tmp_path / "noise.npy", golden["edit/posterior_noise"])
    h, w = map(str, meta["t2i_size_hw"])
    for task, more in (("t2i", ["generate", "--prompt", meta["prompt"], "--height", h,
                                "--width", w]),
                       ("edit", ["edit", "--prompt", meta["edit_prompt"], "--image", SOURCE,
                                 "--image-size", str(meta["edit_image_size"]),
                                 "--reference-noise", str(tmp_path / "noise.npy")])):
        np.save(tmp_path / "init.npy", golden[f"kontext_{task}/init_latents"])
        code = main([*more, "--model", KONTEXT, "--steps", str(meta["steps"]), "--latents",
                     str(tmp_path / "init.npy"), "--save-latents", str(tmp_path / "last.npy"),
                     "--output", str(tmp_path / "out.png")])
        assert code == 0
        assert relative(np.load(tmp_path / "last.npy"), golden[f"kontext_{task}/latent"]) < 1e-5
        picture = np.asarray(Image.open(tmp_path / "out.png"), np.float64)
        assert np.abs(picture - 255 * golden[f"kontext_{task}/np"][0]).max() < 1
        assert "6/6" in capfd.readouterr().err


def test_several_pictures_get_numbers(small, tmp_path, capfd):
    small = small[:small.index("--latents")] + small[small.index("--output"):]
    assert main([*small, "--prompt", "two", "--images-per-prompt", "2"]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [f"out-{i}.png" for i in range(4)]
    assert capfd.readouterr().out.count("48x64") == 4


def error(args, capfd):
    """The one line that a refused command prints."""
    code = main(list(map(str, args)))
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("unipic: ")
    return lines[0]


def replaced(args, name, value):
    args = list(args)
    args[args.index(name) + 1] = value
    return args


@pytest.mark.parametrize(("name", "value", "message"), [
    ("--height", "60", "height 60 is not a multiple of 16"),
    ("--height", "tall", "invalid int value"),
    ("--steps", "0", "--steps must be at least 1"),
    ("--model", "nowhere", "nowhere is not a folder"),
    ("--model", "hf://nobody", "write hf://owner/name"),
    ("--latents", SOURCE, "cannot be read as an array"),
    ("--latents", "none.npy", "none.npy is missing"),
    ("--output", "nowhere/a.png", "is not a folder"),
    ("--output", "a.xyz", "is not a kind of picture"),
])
def test_bad_arguments_are_one_line(name, value, message, small, tmp_path, capfd):
    before = sorted(tmp_path.iterdir())
    assert message in error(replaced(small, name, value), capfd)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_models_are_one_line(small, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(KONTEXT, model)
    args = replaced(small, "--model", str(model))
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert "is not a sound safetensors file" in error(args, capfd)
    assert not (tmp_path / "out.png").exists()
    weights.unlink()
    assert "has no weights" in error(args, capfd)
    weights.write_bytes(whole)
    config = model / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"patch_size": 2', '"patch_size": 2, "new": 1'))
    assert "unknown key 'new'" in error(args, capfd)
    shutil.rmtree(model / "text_encoder_2")
    shutil.copy(GOLDENS / "kontext" / "transformer" / "config.json", config)
    assert "text_encoder_2 is missing" in error(args, capfd)
    assert "exists already" in error(["convert", "--from", KONTEXT, "--to", model], capfd)


def test_bad_pictures_are_one_line(tmp_path, capfd):
    args = ["edit", "--model", KONTEXT, "--prompt", "a", "--image", "no.png", "--output",
            tmp_path / "out.png"]
    assert "no.png is missing" in error(args, capfd)
    (tmp_path / "text.png").write_text("hello")
    assert "cannot be read as a picture" in error(
        replaced(args, "--image", tmp_path / "text.png"), capfd)
    Image.new("1", (20000, 20000)).save(tmp_path / "vast.png")
    assert "enormous" in error(replaced(args, "--image", tmp_path / "vast.png"), capfd)
    Image.new("RGB", (4000, 10)).save(tmp_path / "thin.png")
    assert "too narrow" in error(replaced(args, "--image", tmp_path / "thin.png"), capfd)


def test_converted_model_draws_the_same(small, tmp_path, golden, capfd):
    assert main([*small, "--save-latents", str(tmp_path / "a.npy")]) == 0
    assert main(["convert", "--from", KONTEXT, "--to", str(tmp_path / "jax")]) == 0
    small = replaced(small, "--model", str(tmp_path / "jax"))
    assert main([*small, "--save-latents", str(tmp_path / "b.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert np.array_equal(first(last(np.load(tmp_path / "a.npy"))), np.load(tmp_path / "a.npy"))


def test_the_package_never_imports_torch():
    """A whole import of the package with torch, diffusers and optional parts out of reach."""
    code = ("import sys\n"
            "for name in ('torch', 'diffusers', 'accelerate', 'safetensors'):\n"
            "    sys.modules[name] = None\n"
            "import unipic_jax.cli, unipic_jax.pipelines.edit, unipic_jax.convert.convert\n"
            "import unipic_jax.pipelines.describe\n"
            "from unipic_jax.cli import main\n"
            "raise SystemExit(main(['generate']))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("unipic: the following arguments are required")
