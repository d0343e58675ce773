"""Qwen2.5-VL's `config.json`, in both of its forms: the language model's keys at the top (as
released) or under `text_config` (as later versions of transformers save it)."""

import dataclasses

from unipic_jax.core import config
from unipic_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """`vision_config`, under its own names."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    tokens_per_second: float = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """The language model's keys, under their own names, and the special tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    mrope_section: tuple[int, ...]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        raw = dict(raw)
        vision, text = raw.pop("vision_config", None), raw.pop("text_config", {})
        if not isinstance(vision, dict):
            raise InputError(f"{where}: key 'vision_config' is missing")
        # The copies of the token ids inside text_config may be null; the outer ones count.
        raw = {k: v for k, v in text.items() if v is not None} | raw
        rope = raw.pop("rope_scaling", None) or raw.pop("rope_parameters", None) or {}
        raw.pop("rope_parameters", None)
        if "mrope_section" not in rope:
            raise InputError(f"{where}: key 'rope_scaling' has no mrope_section")
        config.parse(_Rope, rope, f"{where}: rope_scaling", fixed={
            "type": ("mrope", "default"), "rope_type": ("mrope", "default")})
        if "rope_theta" in rope:
            raw["rope_theta"] = rope["rope_theta"]
        head = raw["hidden_size"] // raw["num_attention_heads"]
        if 2 * sum(rope["mrope_section"]) != head:
            raise InputError(f"{where}: mrope_section {rope['mrope_section']} does not add up to "
                             f"half of the head size {head}")
        raw |= {"mrope_section": list(rope["mrope_section"])}
        raw["vision"] = config.parse(
            VisionConfig, _renamed(vision, "in_chans", "in_channels"), f"{where}: vision_config",
            fixed={"hidden_act": ("silu",)},
            ignored=(*config.TRANSFORMERS_KEYS, "spatial_patch_size"))
        return config.parse(
            cls, raw, where,
            fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
            ignored=(*config.TRANSFORMERS_KEYS, "eos_token_id", "vision_end_token_id",
                     "vision_token_id", "layer_types", "max_position_embeddings",
                     "max_window_layers", "sliding_window"))

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class _Rope:
    mrope_section: tuple[int, ...]
    rope_theta: float = 1e6


def _renamed(raw: dict, old: str, new: str) -> dict:
    """`old` is what the release calls `new`, which may stand beside it."""
    return {new: raw[old]} | {k: v for k, v in raw.items() if k != old} if old in raw else raw
