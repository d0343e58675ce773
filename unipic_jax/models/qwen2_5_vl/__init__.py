"""Qwen2.5-VL: a vision tower and a language model."""

from unipic_jax.models.qwen2_5_vl import language as language
from unipic_jax.models.qwen2_5_vl import rope as rope
from unipic_jax.models.qwen2_5_vl import vision as vision
from unipic_jax.models.qwen2_5_vl.config import Config as Config
from unipic_jax.models.qwen2_5_vl.config import VisionConfig as VisionConfig
from unipic_jax.models.qwen2_5_vl.inputs import embed as embed
from unipic_jax.models.qwen2_5_vl.inputs import place as place
from unipic_jax.models.qwen2_5_vl.weights import specs as specs
