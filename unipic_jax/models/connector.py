"""UniPic 2.0's conditioner: learnable queries, and the connector that turns the language model's
states at them into the transformer's context and pooled vector.

Reference: `StableDiffusion3Conditioner` and `ConnectorEncoder` of the release: pre-norm blocks,
attention both ways without mask or positions, no final norm.
"""

import dataclasses

import jax
import jax.numpy as jnp

from unipic_jax.core import config, ops
from unipic_jax.core import remat as remats
from unipic_jax.core.attention import attention
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Spec, Tree, linear, norm, stack


@dataclasses.dataclass(frozen=True)
class Config:
    """The conditioner's `config.json`, its `connector_config` merged in."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    llm_hidden_size: int
    pooled_projection_dim: int
    joint_attention_dim: int
    num_queries: int = 256
    layer_norm_eps: float = 1e-6

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        raw = dict(raw)
        inner = raw.pop("connector_config", None)
        if not isinstance(inner, dict):
            raise InputError(f"{where}: key 'connector_config' is missing")
        return config.parse(cls, inner | raw, where, fixed={"hidden_act": ("gelu_pytorch_tanh",)},
                            ignored=config.TRANSFORMERS_KEYS)


def specs(cfg: Config) -> Tree:
    """The weights; the layers are stacked. The output projections start at zero."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    zeros = jax.nn.initializers.zeros
    layer = {n: linear(D, D, ("embed", "heads")) for n in ("q", "k", "v")} | {
        "norm1": norm(D), "out": linear(D, D, ("heads", "embed")), "norm2": norm(D),
        "up": linear(D, F, ("embed", "mlp")), "down": linear(F, D, ("mlp", "embed"))}
    return {
        "queries": Spec((cfg.num_queries, cfg.llm_hidden_size), (None, "embed"),
                        jax.nn.initializers.normal(cfg.llm_hidden_size**-0.5)),
        "project_in": linear(cfg.llm_hidden_size, D, ("embed", None)),
        "layers": stack(layer, cfg.num_hidden_layers),
        "pooled": linear(D, cfg.pooled_projection_dim, ("embed", None), init=zeros),
        "context": linear(D, cfg.joint_attention_dim, ("embed", None), init=zeros),
    }


def apply(cfg: Config, params: Tree, states: jax.Array, *, remat: str = "none"):
    """The language model's states at the queries [B, S, llm_hidden_size] -> (context
    [B, S, joint_attention_dim], pooled [B, pooled_projection_dim]), in the type of the states.

    `remat` is what the gradient computes again of each layer (`core.remat`)."""
    B, S, _ = states.shape
    x = ops.linear(params["project_in"], states)

    def layer(x, p):
        y = ops.layer_norm(x, p["norm1"], eps=cfg.layer_norm_eps)
        q, k, v = (ops.linear(p[n], y).reshape(B, S, cfg.num_attention_heads, -1) for n in "qkv")
        x = x + ops.linear(p["out"], attention(q, k, v).reshape(B, S, -1))
        y = ops.layer_norm(x, p["norm2"], eps=cfg.layer_norm_eps)
        return x + ops.feed_forward(p, y, jax.nn.gelu), None

    x, _ = ops.scan_layers(remats.remat(layer, remat), x, params["layers"])
    mean = jnp.mean(x.astype(jnp.float32), 1).astype(x.dtype)
    return ops.linear(params["context"], x), ops.linear(params["pooled"], mean)
