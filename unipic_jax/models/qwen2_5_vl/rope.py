"""Rotary positions: of the text on one axis, of pictures in text on three, of patches on two.

Reference: `get_rope_index` and the rotary embeddings of transformers' Qwen2.5-VL.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.models.qwen2_5_vl.config import Config, VisionConfig

VISION_THETA = 10000.0  # fixed in the released code


def text_positions(mask: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Mask [B, S] -> positions int32 [3, B, S]: the count of real tokens before each, the same on
    all axes; padding has 1. What the released editing code gives to pictures, too. NumPy's arrays
    stay on the host."""
    xp = np if isinstance(mask, np.ndarray) else jnp
    mask = mask.astype(xp.int32)
    positions = xp.where(mask > 0, xp.cumsum(mask, -1, dtype=xp.int32) - 1, 1)
    return xp.stack([positions] * 3)


def picture_positions(
    cfg: Config, ids: np.ndarray, grids: Sequence[np.ndarray], mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, S], each row's pictures grids[b] [m, 3] (frames, rows, columns of patches) ->
    (positions int32 [3, B, S] by time, row and column; delta int32 [B]). On the host.

    Text advances all axes by one a token; the tokens of a picture share a time and count rows and
    columns from it, and the text goes on after the longer side. Padding has 1. A token that
    follows n real ones has the position n + delta. Raises ValueError where the image tokens of a
    row are not those of its pictures.
    """
    ids = np.asarray(ids)
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    positions = np.ones((3, *ids.shape), np.int32)
    delta = np.zeros(len(ids), np.int32)
    for b, sizes in enumerate(grids):
        is_image = ids[b, mask[b]] == cfg.image_token_id
        parts, token, start = [], 0, 0  # the next token and its position
        for frames, *sides in np.asarray(sizes).reshape(-1, 3).tolist():
            h, w = (side // cfg.vision.spatial_merge_size for side in sides)
            before = int(np.argmax(is_image[token:])) if is_image[token:].any() else 0
            parts.append(_line(start, before))
            token, start = token + before, start + before
            if frames != 1 or is_image[token:token + h * w].sum() != h * w:
                raise ValueError(f"row {b}: no image tokens for a picture of {frames}x{h}x{w}")
            parts.append(np.indices((1, h, w)).reshape(3, -1) + start)
            token, start = token + h * w, start + max(h, w)
        if is_image[token:].any():
            raise ValueError(f"row {b} has more image tokens than its pictures")
        parts.append(_line(start, len(is_image) - token))
        positions[:, b, mask[b]] = np.concatenate(parts, 1)
        delta[b] = start - token
    return positions, delta


def _line(start: int, n: int) -> np.ndarray:
    return np.tile(np.arange(start, start + n), (3, 1))


def angles(cfg: Config, positions: jax.Array) -> jax.Array:
    """Positions [3, B, S] -> angles [B, S, 1, K/2]: the frequencies are dealt to the axes in the
    runs of `mrope_section`."""
    K = cfg.head_size
    frequency = 1 / cfg.rope_theta ** (np.arange(0, K, 2, dtype=np.float32) / K)
    runs = np.split(frequency.astype(np.float32), np.cumsum(cfg.mrope_section)[:-1])
    positions = positions.astype(jnp.float32)
    return jnp.concatenate(
        [positions[i % 3, ..., None] * f for i, f in enumerate(runs)], -1)[..., None, :]


def vision_angles(cfg: VisionConfig, places: jax.Array) -> jax.Array:
    """Row and column of each patch [..., 2] -> angles [..., 1, K/2], half for each."""
    half = cfg.hidden_size // cfg.num_heads // 2
    frequency = 1 / VISION_THETA ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angle = places.astype(jnp.float32)[..., None] * frequency.astype(np.float32)  # [..., 2, K/4]
    return jnp.concatenate([angle[..., 0, :], angle[..., 1, :]], -1)[..., None, :]


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """x [..., H, K] rotated in the planes (k, k + K/2) by angle [..., 1, K/2], in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
