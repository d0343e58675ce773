"""What goes into Qwen2.5-VL's language model: the tokens' embeddings, and pictures among them."""

import jax
import jax.numpy as jnp

from unipic_jax.core import ops
from unipic_jax.core.params import Tree
from unipic_jax.models.qwen2_5_vl import vision
from unipic_jax.models.qwen2_5_vl.config import Config


def embed(
    cfg: Config, params: Tree, ids: jax.Array, pictures: vision.Pictures | None = None,
    dtype=jnp.float32,
) -> jax.Array:
    """Token ids [B, S] -> embeddings [B, S, D], with each row's pictures at its image tokens."""
    x = ops.embed(params["token"], ids, dtype)
    if pictures is None:
        return x
    return place(cfg, x, ids, vision.apply(cfg.vision, params["vision"], pictures, dtype))


def place(cfg: Config, x: jax.Array, ids: jax.Array, seen: jax.Array) -> jax.Array:
    """x [B, S, D] with the n-th image token of a row replaced by its n-th of seen [B, N, D]."""
    is_image = ids == cfg.image_token_id
    number = jnp.cumsum(is_image, -1) - 1  # [B, S]
    seen = jnp.take_along_axis(seen, number[..., None], 1, mode="clip")
    return jnp.where(is_image[..., None], seen.astype(x.dtype), x)
