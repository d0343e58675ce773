"""The weights of Qwen2.5-VL; the blocks of the vision tower and the layers of the language model
are stacked."""

import jax

from unipic_jax.core.params import Spec, Tree, linear, norm, stack
from unipic_jax.models.qwen2_5_vl.config import Config, VisionConfig


def specs(cfg: Config) -> Tree:
    D, F = cfg.hidden_size, cfg.intermediate_size
    HK, GK = cfg.num_attention_heads * cfg.head_size, cfg.num_key_value_heads * cfg.head_size
    layer = {
        "norm1": norm(D, bias=False),
        "q": linear(D, HK, ("embed", "heads")),
        "k": linear(D, GK, ("embed", "heads")),
        "v": linear(D, GK, ("embed", "heads")),
        "out": linear(HK, D, ("heads", "embed"), bias=False),
        "norm2": norm(D, bias=False),
        "gate": linear(D, F, ("embed", "mlp"), bias=False),
        "up": linear(D, F, ("embed", "mlp"), bias=False),
        "down": linear(F, D, ("mlp", "embed"), bias=False),
    }
    tree = {
        "vision": _vision_specs(cfg.vision),
        "token": Spec((cfg.vocab_size, D), ("vocab", "embed"), jax.nn.initializers.normal(0.02)),
        "layers": stack(layer, cfg.num_hidden_layers),
        "norm": norm(D, bias=False),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = linear(D, cfg.vocab_size, ("embed", "vocab"), bias=False)
    return tree


def _vision_specs(cfg: VisionConfig) -> Tree:
    D, F = cfg.hidden_size, cfg.intermediate_size
    merged = D * cfg.spatial_merge_size**2
    block = {
        "norm1": norm(D, bias=False),
        "qkv": linear(D, 3 * D, ("embed", "heads")),
        "out": linear(D, D, ("heads", "embed")),
        "norm2": norm(D, bias=False),
        "gate": linear(D, F, ("embed", "mlp")),
        "up": linear(D, F, ("embed", "mlp")),
        "down": linear(F, D, ("mlp", "embed")),
    }
    patch = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size, cfg.in_channels, D)
    return {
        "patch": {"kernel": Spec(patch, (None, None, None, None, "embed"),
                                 jax.nn.initializers.lecun_normal())},
        "blocks": stack(block, cfg.depth),
        "merger": {"norm": norm(D, bias=False),
                   "up": linear(merged, merged, ("embed", "mlp")),
                   "down": linear(merged, cfg.out_hidden_size, ("mlp", "embed"))},
    }
