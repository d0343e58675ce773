"""Floating-point operations of the models, counted from their configs.

All counts are of one sample's forward. A product of [m, k] and [k, n] is 2mnk; attention's scores
and values are counted in full, masked or not; what acts on single elements is left out.
"""

from collections.abc import Iterable

import jax

from unipic_jax.models import (
    autoencoder,
    clip_text,
    connector,
    mmdit,
    t5_encoder,
)
from unipic_jax.models.qwen2_5_vl.config import Config as QwenConfig
from unipic_jax.models.qwen2_5_vl.config import VisionConfig

PEAKS = {  # dense bfloat16 FLOP/s of a device, by the start of JAX's name for it
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
}


def training(trained: float, passed: float = 0.0, frozen: float = 0.0) -> float:
    """Operations of a training step from those of forwards: 3 trained + 2 passed + frozen.

    The backward of a product is two of its size, one for the gradient of its input and one for
    that of its weight. Parts that train need both; frozen parts between them and the loss
    (`passed`), and those that train through adapters, only the first; other frozen parts none.
    Forwards that are computed again to save memory are not counted.
    """
    return 3 * trained + 2 * passed + frozen


def mfu(flops_per_second: float, devices: Iterable[jax.Device]) -> float | None:
    """The share of the devices' peak in bfloat16; None where a device's peak is not known."""
    peaks = [next((peak for name, peak in PEAKS.items() if d.device_kind.startswith(name)), None)
             for d in devices]
    return None if None in peaks else flops_per_second / sum(peaks)


def transformer(cfg: mmdit.Config, T: int, S: int, *, reference: int = 0) -> float:
    """The MMDiT on T tokens of noise, as many of a reference as `reference`, and S of text.

    A layer, with N = T + reference: D^2 (24 N + 24 S) for the two streams' projections (8) and
    feed-forwards (16), 4 D (N + S)^2 for attention, 24 D^2 for adaLN; dual layers 8 D^2 N +
    4 D N^2 + 6 D^2 more; the last layer's text has only its q, k and v, and 4 D^2 of adaLN. Then
    the patches, context, time and pooled embeddings and the output.
    """
    D, L, N = cfg.width, cfg.num_layers, T + reference
    dual, patch = len(set(cfg.dual_attention_layers)), cfg.patch_size**2
    layers = L * (24 * D**2 * (N + S) + 4 * D * (N + S)**2 + 24 * D**2)
    layers += dual * (8 * D**2 * N + 4 * D * N**2 + 6 * D**2)
    layers -= 18 * D**2 * S + 8 * D**2
    ends = 2 * D * (patch * cfg.in_channels * N + cfg.joint_attention_dim * S
                    + patch * cfg.out_channels * T)
    condition = 2 * D * (mmdit.TIME_WIDTH + D + cfg.pooled_projection_dim + D + 2 * D)
    return layers + ends + condition


def conditioner(cfg: connector.Config, S: int) -> float:
    """The connector on S states: L (8 D^2 S + 4 D F S + 4 D S^2), the projection into it, and
    those to context (S) and pooled vector (1)."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    ends = 2 * D * (S * (cfg.llm_hidden_size + cfg.joint_attention_dim)
                    + cfg.pooled_projection_dim)
    return cfg.num_hidden_layers * _layer(S, D, D, D, 2 * D * F) + ends


def language(cfg: QwenConfig, S: int, *, logits: int = 0) -> float:
    """Qwen2.5-VL's language model on S tokens: L (4 D HK S + 4 D GK S + 6 D F S + 4 HK S^2),
    with G heads of keys and values; 2 D V for each of `logits` places."""
    D, K = cfg.hidden_size, cfg.head_size
    layer = _layer(S, D, cfg.num_attention_heads * K, cfg.num_key_value_heads * K,
                   3 * D * cfg.intermediate_size)
    return cfg.num_hidden_layers * layer + 2 * D * cfg.vocab_size * logits


def vision(cfg: VisionConfig, windows: int) -> float:
    """Qwen2.5-VL's vision tower on a prompt's windows (`vision.count_windows`), padding included.

    With N patches, M of them a window: L (8 D^2 N + 6 D F N + 4 D N M), where M is N in the layers
    of full attention; then the embedding of the patches and the merger.
    """
    D, M = cfg.hidden_size, (cfg.window_size // cfg.patch_size)**2
    N, merged = windows * M, D * cfg.spatial_merge_size**2
    full = len(set(cfg.fullatt_block_indexes) & set(range(cfg.depth)))
    layers = cfg.depth * N * (8 * D**2 + 6 * D * cfg.intermediate_size)
    layers += 4 * D * N * (full * N + (cfg.depth - full) * M)
    pixels = cfg.in_channels * cfg.temporal_patch_size * cfg.patch_size**2
    tokens = N // cfg.spatial_merge_size**2
    return layers + 2 * N * pixels * D + 2 * tokens * merged * (merged + cfg.out_hidden_size)


def clip(cfg: clip_text.Config, S: int) -> float:
    """A CLIP text encoder on S tokens: L (8 D^2 S + 4 D F S + 4 D S^2) and the projection."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    return cfg.num_hidden_layers * _layer(S, D, D, D, 2 * D * F) + 2 * D * cfg.projection_dim


def t5(cfg: t5_encoder.Config, S: int) -> float:
    """The T5 encoder on S tokens: L (8 D HK S + 6 D F S + 4 HK S^2)."""
    D, HK = cfg.d_model, cfg.num_heads * cfg.d_kv
    return cfg.num_layers * _layer(S, D, HK, HK, 3 * D * cfg.d_ff)


def encode(cfg: autoencoder.Config, height: int, width: int) -> float:
    """The autoencoder's encoder on a picture: 2 h w k^2 C_in C_out a convolution that writes
    [h, w, C_out] with a kernel of side k, and the middle's attention."""
    widths, size, total = cfg.block_out_channels, height * width, 0.0
    total += 18 * size * cfg.in_channels * widths[0]
    for i, (a, b) in enumerate(zip((widths[0], *widths), widths)):
        total += _resnets(size, a, b, cfg.layers_per_block)
        if i < len(widths) - 1:
            size //= 4
            total += 18 * size * b * b
    return total + _middle(size, widths[-1]) + 18 * size * widths[-1] * 2 * cfg.latent_channels


def decode(cfg: autoencoder.Config, height: int, width: int) -> float:
    """The autoencoder's decoder to a picture of that size, counted as `encode` is."""
    widths = cfg.block_out_channels[::-1]
    size = height * width // cfg.factor**2
    total = 18 * size * cfg.latent_channels * widths[0] + _middle(size, widths[0])
    for i, (a, b) in enumerate(zip((widths[0], *widths), widths)):
        total += _resnets(size, a, b, cfg.layers_per_block + 1)
        if i < len(widths) - 1:
            size *= 4
            total += 18 * size * b * b
    return total + 18 * size * widths[-1] * cfg.out_channels


def _layer(S, D, HK, GK, feed_forward):
    """A transformer's layer on S tokens; `feed_forward` is the size of its matrices."""
    return 2 * S * (D * (2 * HK + 2 * GK) + feed_forward) + 4 * HK * S**2


def _resnets(size, a, b, n):
    """n residual blocks of a level that `a` channels enter and `b` leave."""
    return 18 * size * b * (a + (2 * n - 1) * b) + (2 * size * a * b if a != b else 0)


def _middle(size, d):
    return _resnets(size, d, d, 2) + 8 * size * d**2 + 4 * size**2 * d
