"""The T5 encoder (`T5EncoderModel` of transformers, version 1.1 with gated GELU)."""

import dataclasses

import jax
import jax.numpy as jnp

from unipic_jax.core import config, ops
from unipic_jax.core.attention import attention
from unipic_jax.core.params import Spec, Tree, linear, norm, stack


@dataclasses.dataclass(frozen=True)
class Config:
    """The encoder's `config.json`, under its own names; the defaults are transformers'."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        return config.parse(
            cls, {"feed_forward_proj": "relu"} | raw, where,
            fixed={"feed_forward_proj": ("gated-gelu",), "dense_act_fn": ("gelu_new",),
                   "is_gated_act": (True,)},
            ignored=(*config.TRANSFORMERS_KEYS, "eos_token_id", "num_decoder_layers",
                     "is_encoder_decoder", "tie_word_embeddings", "n_positions",
                     "scale_decoder_outputs"))


def specs(cfg: Config) -> Tree:
    """The weights; the layers are stacked."""
    D, F, HK = cfg.d_model, cfg.d_ff, cfg.num_heads * cfg.d_kv
    layer = {n: linear(D, HK, ("embed", "heads"), bias=False) for n in ("k", "v")} | {
        # Its scores are not divided by the root of the heads' size, and so begin smaller.
        "q": linear(D, HK, ("embed", "heads"), bias=False,
                    init=jax.nn.initializers.normal((D * cfg.d_kv) ** -0.5)),
        "norm1": norm(D, bias=False), "out": linear(HK, D, ("heads", "embed"), bias=False),
        "norm2": norm(D, bias=False),
        "gate": linear(D, F, ("embed", "mlp"), bias=False),
        "up": linear(D, F, ("embed", "mlp"), bias=False),
        "down": linear(F, D, ("mlp", "embed"), bias=False)}
    return {
        "token": Spec((cfg.vocab_size, D), ("vocab", "embed"), jax.nn.initializers.normal(1.0)),
        # So large that heads tell distances apart from the first step on.
        "relative_bias": Spec((cfg.relative_attention_num_buckets, cfg.num_heads), (None, None),
                              jax.nn.initializers.normal(1.5)),
        "layers": stack(layer, cfg.num_layers),
        "norm": norm(D, bias=False),
    }


def apply(cfg: Config, params: Tree, ids: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Token ids [B, S] -> normalized final states [B, S, D]; padding takes part, unmasked."""
    B, S = ids.shape
    x = ops.embed(params["token"], ids, dtype)
    bias = params["relative_bias"].astype(jnp.float32)[_buckets(cfg, S)].transpose(2, 0, 1)
    eps = cfg.layer_norm_epsilon

    def layer(x, p):
        y = ops.rms_norm(x, p["norm1"], eps=eps)
        q, k, v = (ops.linear(p[n], y).reshape(B, S, cfg.num_heads, cfg.d_kv) for n in "qkv")
        y = attention(q, k, v, bias=bias, scale=1.0)  # T5 keeps the scale in its weights
        x = x + ops.linear(p["out"], y.reshape(B, S, -1))
        y = ops.rms_norm(x, p["norm2"], eps=eps)
        return x + ops.feed_forward(p, y, jax.nn.gelu), None

    x, _ = ops.scan_layers(layer, x, params["layers"])
    return ops.rms_norm(x, params["norm"], eps=eps)


def _buckets(cfg: Config, S: int) -> jax.Array:
    """Bucket [S, S] of each (query, key): half for each direction, of which half are exact
    distances and half grow by a constant ratio up to the maximum distance (T5, section 2.1)."""
    distance = jnp.arange(S) - jnp.arange(S)[:, None]
    half = cfg.relative_attention_num_buckets // 2
    exact, far = half // 2, jnp.abs(distance)
    ratio = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact)
    ratio = ratio / jnp.log(jnp.float32(cfg.relative_attention_max_distance / exact))
    grown = jnp.minimum(exact + (ratio * (half - exact)).astype(jnp.int32), half - 1)
    return jnp.where(distance > 0, half, 0) + jnp.where(far < exact, far, grown)
