"""The judge of edits: a score from what Qwen2.5-VL makes of two pictures and an instruction.

UniPic 2.0's Skywork-EditReward is Qwen2.5-VL fine-tuned by regression (section 3.3 of its report);
its weights and its head are not public, so that this head is our own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from unipic_jax.core import config, ops
from unipic_jax.core.params import Tree, linear


@dataclasses.dataclass(frozen=True)
class Config:
    """The head's `config.json`."""

    hidden_size: int  # of the language model

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        return config.parse(cls, raw, where, ignored=("_class_name",))


def specs(cfg: Config) -> Tree:
    """The weights of the head."""
    return {"score": linear(cfg.hidden_size, 1, ("embed", None))}


def apply(cfg: Config, params: Tree, states: jax.Array, mask: jax.Array) -> jax.Array:
    """The language model's states [B, S, D], of which `mask` [B, S] tells the real ones, the first
    of each row -> a score of each row, float32 [B], by the state of its last token."""
    last = mask.sum(-1, dtype=jnp.int32)[:, None] == jnp.arange(1, states.shape[1] + 1)
    state = jnp.where(last[..., None], states, 0).sum(1)
    return ops.linear(params["score"], state.astype(jnp.float32))[:, 0]
