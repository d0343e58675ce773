"""Qwen2.5-VL's image preprocessing against the goldens and transformers' PIL processor."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

from unipic_jax.conditioning import qwen_images
from unipic_jax.core.errors import InputError

FOLDER = GOLDENS / "metaquery" / "qwen2_5_vl"


def picture(width, height, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize(("size", "zoom"), [("small", 1), ("large", 2)])
def test_pixels_of_a_description_equal_golden(golden, size, zoom):
    source = Image.open(GOLDENS / "source.png")
    source = source.resize([zoom * side for side in source.size], Image.Resampling.NEAREST)
    patches, grid = qwen_images.preprocess(qwen_images.read_config(FOLDER), [source])
    np.testing.assert_array_equal(grid, golden[f"understand/{size}/grid_thw"])
    np.testing.assert_array_equal(patches, golden[f"understand/{size}/pixel_values"])


def test_pixels_of_an_edit_equal_golden(golden):
    levels = golden["edit/resized"]  # [96, 128, 3]
    pixels = int(levels.shape[0] * 28 / 32 * levels.shape[1] * 28 / 32)
    cfg = dataclasses.replace(qwen_images.read_config(FOLDER), min_pixels=pixels, max_pixels=pixels)
    patches, grid = qwen_images.preprocess(cfg, [Image.fromarray(levels)] * 2)
    np.testing.assert_array_equal(grid, golden["metaquery_edit/grid_thw"])
    np.testing.assert_array_equal(patches, golden["metaquery_edit/pixel_values"])


# Smaller than one token, larger than the most pixels, already right, long, odd.
SIZES = [(9, 13), (400, 300), (112, 56), (1200, 40), (57, 201), (20, 3000)]


def test_pixels_equal_transformers():
    from transformers import Qwen2VLImageProcessorPil
    raw = json.loads((FOLDER / "preprocessor_config.json").read_text())
    limits = dict(min_pixels=60 * 60, max_pixels=200 * 200)
    raw |= limits | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.3, 0.2]}
    cfg = qwen_images.Config.from_json(raw, "")
    theirs = Qwen2VLImageProcessorPil(**raw)
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    want = theirs(images=pictures, return_tensors="np")
    patches, grid = qwen_images.preprocess(cfg, pictures)
    np.testing.assert_array_equal(grid, want["image_grid_thw"])
    np.testing.assert_array_equal(patches, want["pixel_values"])
    assert patches.dtype == np.float32


def test_sizes_equal_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    cfg = qwen_images.Config(min_pixels=56 * 56, max_pixels=300 * 300)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 1500, (500, 2)).tolist():
        assert qwen_images.smart_resize(cfg, height, width) == smart_resize(
            height, width, 28, cfg.min_pixels, cfg.max_pixels)


def test_no_pictures_are_no_patches():
    patches, grid = qwen_images.preprocess(qwen_images.Config(), [])
    assert patches.shape == (0, 1176)
    assert grid.shape == (0, 3)


def test_a_needle_is_refused():
    with pytest.raises(InputError, match="too narrow"):
        qwen_images.preprocess(qwen_images.Config(), [picture(2010, 10)])


@pytest.mark.parametrize(("change", "message"), [
    ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
    ({"image_processor_type": None}, "image processor"),
    ({"resample": 2}, "resample"),
    ({"do_normalize": False}, "do_normalize"),
    ({"patch_size": "14"}, "patch_size"),
    ({"size": 3}, "size"),
    ({"colour": 1}, "colour"),
])
def test_what_is_not_understood_is_refused(tmp_path, change, message):
    raw = json.loads((FOLDER / "preprocessor_config.json").read_text()) | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message):
        qwen_images.read_config(tmp_path)


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="missing"):
        qwen_images.read_config(tmp_path)


def test_limits_are_read_by_either_name(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    raw = json.loads((FOLDER / file.name).read_text())
    for change, want in (
            ({"min_pixels": 10, "max_pixels": 20}, (10, 20)),
            ({"min_pixels": None, "max_pixels": None,
              "size": {"shortest_edge": 30, "longest_edge": 40}}, (30, 40)),
            ({"min_pixels": None, "max_pixels": None, "size": None}, (3136, 1003520))):
        file.write_text(json.dumps(raw | change))
        cfg = qwen_images.read_config(tmp_path)
        assert (cfg.min_pixels, cfg.max_pixels) == want
