"""Pictures as Qwen2.5-VL takes them: patches, and the grid they lie on.

Reference: transformers' Qwen2-VL image processor, the one over PIL.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unipic_jax.core import config, images, ops
from unipic_jax.core.errors import InputError

# The processors of transformers that compute this, by the names of several generations.
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil",
              "Qwen2_5_VLImageProcessor")
MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class Config:
    """`preprocessor_config.json`, under its own names; the defaults are transformers'."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        """Raises InputError for another image processor or a value that is not supported."""
        raw = dict(raw)
        kind, size = raw.pop("image_processor_type", None), raw.pop("size", None) or {}
        if kind not in PROCESSORS:
            raise InputError(f"{where} names the image processor {kind!r}; known are "
                             f"{', '.join(PROCESSORS)}")
        if not isinstance(size, dict):
            raise InputError(f"{where}: size = {size!r} is not an object")
        for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            limit = size.get(ours, size.get(theirs)) if raw.get(ours) is None else raw[ours]
            raw.pop(ours, None)
            raw |= {} if limit is None else {ours: limit}
        return config.parse(
            cls, raw, where,
            fixed={"resample": (Image.Resampling.BICUBIC,), "do_center_crop": (None, False),
                   "do_pad": (None, False)}
            | {f"do_{n}": (True,) for n in ("resize", "rescale", "normalize", "convert_rgb")},
            ignored=("processor_class", "feature_extractor_type", "crop_size", "pad_size",
                     "data_format", "input_data_format", "default_to_square", "device",
                     "disable_grouping", "return_tensors", "image_seq_length"))


def read_config(folder: Path) -> Config:
    """The image processor of a model folder; InputError where it is missing or not supported."""
    file = Path(folder) / "preprocessor_config.json"
    raw = config.read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file} is not an object")
    return Config.from_json(raw, str(file))


def smart_resize(cfg: Config, height: int, width: int) -> tuple[int, int]:
    """The (height, width) a picture is resized to: multiples of patch * merge, with between
    `min_pixels` and `max_pixels` pixels, and nearly its own aspect (`smart_resize`).

    Raises InputError where a side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"a picture of {width}x{height} is too narrow; crop it so that no side is "
                         f"more than {MAX_ASPECT} times the other")
    factor = cfg.patch_size * cfg.merge_size
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > cfg.max_pixels:
        beta = math.sqrt(height * width / cfg.max_pixels)
        h, w = (max(factor, math.floor(s / beta / factor) * factor) for s in (height, width))
    elif h * w < cfg.min_pixels:
        beta = math.sqrt(cfg.min_pixels / (height * width))
        h, w = (math.ceil(s * beta / factor) * factor for s in (height, width))
    return h, w


def preprocess(cfg: Config, pictures: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of one prompt -> (patches float32 [n, 3 * frames * P * P], grid int64 [m, 3]
    of frames, rows and columns of patches).

    The patches of a picture come token by token (merge x merge patches each), in reading order,
    channels first; all frames of a patch are the same. Raises InputError as `smart_resize`.
    """
    P, M, frames = cfg.patch_size, cfg.merge_size, cfg.temporal_patch_size
    mean, std = (np.array(a, np.float32) for a in (cfg.image_mean, cfg.image_std))
    patches, grid = [np.zeros((0, 3 * frames * P * P), np.float32)], []
    for picture in pictures:
        height, width = smart_resize(cfg, picture.height, picture.width)
        picture = images.to_rgb(picture).resize((width, height), Image.Resampling.BICUBIC)
        x = (np.asarray(picture, np.float64) * cfg.rescale_factor).astype(np.float32)
        x = (x - mean) / std  # [height, width, 3]
        h, w = height // P, width // P
        x = x.reshape(h // M, M, P, w // M, M, P, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        x = np.repeat(x[:, :, :, :, :, None], frames, 5)  # [h / M, w / M, M, M, 3, frames, P, P]
        patches.append(x.reshape(h * w, -1))
        grid.append((1, h, w))
    return np.concatenate(patches), np.array(grid, np.int64).reshape(-1, 3)


def patches(cfg: Config, pictures: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pictures [B, H, W, 3] in [0, 1] -> the patches float32 [B, n, 3 * frames * P * P] that
    `preprocess` makes of each at (height, width) `size`; inside a program, where the resampling
    rounds a little otherwise than PIL's."""
    P, M, (height, width) = cfg.patch_size, cfg.merge_size, size
    mean, std = (np.array(a, np.float32) for a in (cfg.image_mean, cfg.image_std))
    x = pictures.astype(jnp.float32)
    x = jax.image.resize(x, (len(x), height, width, 3), "bicubic")
    x = jnp.round(jnp.clip(x, 0, 1) * 255) * cfg.rescale_factor
    x = (x - mean) / std
    h, w = height // P, width // P
    x = ops.reshape(x, len(x), h // M, M, P, w // M, M, P, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    x = jnp.repeat(x[:, :, :, :, :, :, None], cfg.temporal_patch_size, 6)
    return ops.reshape(x, len(x), h * w, 3 * cfg.temporal_patch_size * P * P)
