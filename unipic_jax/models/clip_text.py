"""The CLIP text encoders (`CLIPTextModelWithProjection` of transformers)."""

import dataclasses

import jax
import jax.numpy as jnp

from unipic_jax.core import config, ops
from unipic_jax.core import mesh as meshes
from unipic_jax.core.attention import attention
from unipic_jax.core.params import Spec, Tree, linear, norm, stack


@dataclasses.dataclass(frozen=True)
class Config:
    """The encoder's `config.json`, under its own names; the defaults are transformers'."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_dim: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        return config.parse(cls, raw, where, fixed={"hidden_act": ("quick_gelu", "gelu")},
                            ignored=config.TRANSFORMERS_KEYS)


def specs(cfg: Config) -> Tree:
    """The weights; the layers are stacked."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    normal = jax.nn.initializers.normal(0.02)
    layer = {n: linear(D, D, ("embed", "heads")) for n in ("q", "k", "v")} | {
        "norm1": norm(D), "out": linear(D, D, ("heads", "embed")), "norm2": norm(D),
        "up": linear(D, F, ("embed", "mlp")), "down": linear(F, D, ("mlp", "embed"))}
    return {
        "token": Spec((cfg.vocab_size, D), ("vocab", "embed"), normal),
        "position": Spec((cfg.max_position_embeddings, D), (None, "embed"), normal),
        "layers": stack(layer, cfg.num_hidden_layers),
        "norm": norm(D),
        "projection": linear(D, cfg.projection_dim, ("embed", None), bias=False),
    }


def apply(cfg: Config, params: Tree, ids: jax.Array, dtype=jnp.float32):
    """Token ids [B, S] -> (hidden states before the last layer [B, S, D], pooled [B, projection]).

    Causal, and without a padding mask, as Stable Diffusion 3 uses it. The pooled vector is the
    projected final state at the first end token.
    """
    B, S = ids.shape
    x = ops.embed(params["token"], ids, dtype)
    x = x + meshes.gather(params["position"][:S].astype(dtype))
    act = ops.ACTIVATIONS[cfg.hidden_act]

    def layer(carry, p):
        x, _ = carry
        y = ops.layer_norm(x, p["norm1"], eps=cfg.layer_norm_eps)
        q, k, v = (ops.linear(p[n], y).reshape(B, S, cfg.num_attention_heads, -1) for n in "qkv")
        y = x + ops.linear(p["out"], attention(q, k, v, causal=True).reshape(B, S, -1))
        z = ops.layer_norm(y, p["norm2"], eps=cfg.layer_norm_eps)
        return (y + ops.feed_forward(p, z, act), x), None

    (x, penultimate), _ = ops.scan_layers(layer, (x, x), params["layers"])
    x = ops.layer_norm(x, params["norm"], eps=cfg.layer_norm_eps)
    # Configs that say 2 predate the right end token: there the largest id is the end.
    end = jnp.argmax(ids if cfg.eos_token_id == 2 else ids == cfg.eos_token_id, -1)
    at_end = jnp.arange(S) == end[:, None]  # [B, S]
    pooled = jnp.sum(jnp.where(at_end[..., None], x, 0), 1)
    return penultimate, ops.linear(params["projection"], pooled)
