"""Qwen2.5-VL's vision tower: windowed attention, a few blocks of attention within each picture.

Patches are kept window by window, each window padded to its full size, from the embedding to the
merger, so that a window is an axis of an array and no index is needed between. The letters here:
W windows, M patches of a window, N tokens of the language model (merged patches).
Reference: `Qwen2_5_VisionTransformerPretrainedModel` of transformers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core import ops
from unipic_jax.core.attention import attention
from unipic_jax.core.params import Tree
from unipic_jax.models.qwen2_5_vl import rope
from unipic_jax.models.qwen2_5_vl.config import VisionConfig

EPS = 1e-6  # fixed in the released code


class Pictures(NamedTuple):
    """The pictures of B prompts, each row with any number of them, padded to W windows."""

    patches: jax.Array  # float [B, W, M, channels * frames * P * P]
    places: jax.Array  # int32 [B, W, M, 2]: row and column of each patch in its picture
    segments: jax.Array  # int32 [B, W, M]: its picture, from 1; 0 is padding
    order: jax.Array  # int32 [B, N]: where the n-th token in reading order lies


def count_windows(cfg: VisionConfig, grid: np.ndarray) -> int:
    """The windows that pictures of grid [m, 3] (frames, rows, columns of patches) need."""
    side = cfg.window_size // cfg.patch_size
    return int(sum(-(-h // side) * -(-w // side) for _, h, w in np.asarray(grid).tolist()))


def pack(
    cfg: VisionConfig, rows: Sequence[tuple[np.ndarray, np.ndarray]], windows: int | None = None
) -> Pictures:
    """Each prompt's patches [n, ...] in the image processor's order and grid [m, 3] -> `Pictures`
    of numpy arrays. On the host.

    `windows` is the number that every row is padded to, by default what the largest needs. Raises
    ValueError where it is too small, or where patches and grids do not fit.
    """
    needed = max(count_windows(cfg, grid) for _, grid in rows)
    if windows is not None and windows < needed:
        raise ValueError(f"the pictures need {needed} windows, more than {windows}")
    return Pictures(*(np.stack(a) for a in zip(
        *(_row(cfg, patches, grid, windows or needed) for patches, grid in rows))))


def _row(cfg, patches, grid, windows) -> Pictures:
    unit = cfg.spatial_merge_size**2
    side = cfg.window_size // cfg.spatial_merge_size // cfg.patch_size  # of a window, in tokens
    patches, grid = np.asarray(patches, np.float32), np.asarray(grid)
    if (grid[:, 0] != 1).any() or (grid[:, 1:] % cfg.spatial_merge_size).any():
        raise ValueError(f"grid {grid.tolist()}: pictures have one frame, and whole tokens")
    if len(patches) != grid.prod(1).sum():
        raise ValueError(f"{len(patches)} patches are not those of grid {grid.tolist()}")

    tokens = np.full((windows, side * side), -1)  # [W, M / unit]: in reading order
    places = np.zeros((len(patches), 2), np.int32)
    segments = np.zeros(len(patches), np.int32)
    window = token = 0
    for i, (_, *sides) in enumerate(grid.tolist()):
        h, w = (s // cfg.spatial_merge_size for s in sides)
        whole = np.arange(token, token + h * w).reshape(h, w)
        whole = np.pad(whole, ((0, -h % side), (0, -w % side)), constant_values=-1)
        cut = whole.reshape(whole.shape[0] // side, side, -1, side).swapaxes(1, 2)
        cut = cut.reshape(-1, side * side)
        tokens[window:window + len(cut)] = cut
        place = np.moveaxis(np.indices(sides), 0, -1)  # [rows, columns, 2]
        place = place.reshape(h, cfg.spatial_merge_size, w, cfg.spatial_merge_size, 2)
        mine = slice(token * unit, (token + h * w) * unit)
        places[mine] = place.swapaxes(1, 2).reshape(-1, 2)
        segments[mine] = i + 1
        window, token = window + len(cut), token + h * w

    real = tokens >= 0
    source = (tokens[..., None] * unit + np.arange(unit)).reshape(windows, -1)  # [W, M]
    real_patches = np.repeat(real, unit, -1)
    order = np.zeros(tokens.size, np.int32)
    order[tokens[real]] = np.flatnonzero(real)

    def laid(a):
        out = np.zeros((*source.shape, *a.shape[1:]), a.dtype)
        out[real_patches] = a[source[real_patches]]
        return out

    return Pictures(laid(patches), laid(places), laid(segments), order)


def apply(cfg: VisionConfig, params: Tree, pictures: Pictures, dtype=jnp.float32) -> jax.Array:
    """The pictures' tokens in reading order [B, N, out_hidden_size]; those past a row's last
    picture repeat its first."""
    B, W, M = pictures.segments.shape
    kernel = params["patch"]["kernel"].transpose(3, 0, 1, 2, 4)  # as the patches are flattened
    x = ops.linear({"kernel": kernel.reshape(-1, cfg.hidden_size)}, pictures.patches.astype(dtype))
    angle = rope.vision_angles(cfg, pictures.places)
    full = np.isin(np.arange(cfg.depth), cfg.fullatt_block_indexes)

    def block(x, layer):
        p, full = layer
        y = ops.rms_norm(x, p["norm1"], eps=EPS)
        q, k, v = (ops.linear(part, y).reshape(B, W, M, cfg.num_heads, -1)
                   for part in _parts(p["qkv"]))
        q, k = rope.rotate(q, angle), rope.rotate(k, angle)
        y = lax.cond(full, lambda *a: _attend(*a, B, W * M), lambda *a: _attend(*a, B * W, M),
                     q, k, v, pictures.segments)
        x = x + ops.linear(p["out"], y.reshape(B, W, M, -1))
        y = ops.rms_norm(x, p["norm2"], eps=EPS)
        return x + ops.feed_forward(p, y, jax.nn.silu), None

    x, _ = ops.scan_layers(block, x, (params["blocks"], full))
    p, unit = params["merger"], cfg.spatial_merge_size**2
    x = ops.reshape(ops.rms_norm(x, p["norm"], eps=EPS), B, W * M // unit, unit * cfg.hidden_size)
    x = ops.linear(p["down"], jax.nn.gelu(ops.linear(p["up"], x), approximate=False))
    return jnp.take_along_axis(x, pictures.order[..., None], 1, mode="clip")


def _attend(q, k, v, segments, sequences, length):
    """Attention within each picture, over [B, W, M] as so many sequences of a length."""
    merged = (a.reshape(sequences, length, *a.shape[3:]) for a in (q, k, v))
    segments = segments.reshape(sequences, length)
    out = attention(*merged, segments=(segments, segments))
    return out.reshape(q.shape, out_sharding=meshes.spec_of(q))


def _parts(p):
    """Queries', keys' and values' weights from the joint ones; each is split over devices as the
    joint ones were."""

    def cut(w):
        spec = meshes.spec_of(w)
        parts = jnp.split(meshes.replicate(w), 3, -1)
        if spec is None:
            return parts
        return [jax.reshard(a, P(*[None] * (w.ndim - 1), spec[-1])) for a in parts]

    leaves, form = jax.tree.flatten(p)
    return [form.unflatten(parts) for parts in zip(*map(cut, leaves))]
