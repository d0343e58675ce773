"""Counts against XLA's own, against the full-size figures, and shares of peaks."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic_jax.core import attention, params
from unipic_jax.models import autoencoder, clip_text, connector, mmdit, t5_encoder
from unipic_jax.models.qwen2_5_vl import language, vision
from unipic_jax.models.qwen2_5_vl import weights as qwen_weights
from unipic_jax.models.qwen2_5_vl.config import Config as QwenConfig
from unipic_jax.models.qwen2_5_vl.config import VisionConfig
from unipic_jax.train import flops

B = 2


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """XLA counts the body of a loop over blocks once."""
    monkeypatch.setattr(attention, "_choose", lambda *_: "xla")


def transformer(layers: int, dual: tuple[int, ...], heads: int = 4) -> mmdit.Config:
    D = heads * 64
    return mmdit.Config(
        num_layers=layers, attention_head_dim=64, num_attention_heads=heads, in_channels=16,
        out_channels=16, patch_size=2, joint_attention_dim=512, caption_projection_dim=D,
        pooled_projection_dim=128, pos_embed_max_size=96, dual_attention_layers=dual)


def xla(f, specs, *arrays) -> float:
    """XLA's count of f(parameters, arrays), for one sample of the batch."""
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    cost = jax.jit(f).lower(params.abstract(specs), *arrays).compile().cost_analysis()
    return cost["flops"] / B


def close(ours, theirs):
    # Theirs has the work on single elements, too.
    assert 0.94 * theirs < ours < 1.005 * theirs, ours / theirs


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("dual", [(), (0,)])
def test_transformer(dual, edit):
    cfg = transformer(2, dual)  # one scanned layer, which XLA counts once, and the last
    latents = jnp.zeros((B, 32, 32, 16))
    close(flops.transformer(cfg, 256, 96, reference=256 * edit),
          xla(lambda p, x, t, c, y: mmdit.apply(cfg, p, x, t, c, y, x if edit else None),
              mmdit.specs(cfg), latents, jnp.zeros(B), jnp.zeros((B, 96, 512)),
              jnp.zeros((B, 128))))


def test_conditioner():
    cfg = connector.Config(hidden_size=256, intermediate_size=1024, num_hidden_layers=1,
                           num_attention_heads=4, llm_hidden_size=192, pooled_projection_dim=128,
                           joint_attention_dim=512)
    close(flops.conditioner(cfg, 256), xla(lambda p, x: connector.apply(cfg, p, x),
                                           connector.specs(cfg), jnp.zeros((B, 256, 192))))


def test_clip():
    cfg = clip_text.Config(hidden_size=512, intermediate_size=2048, num_hidden_layers=1,
                           num_attention_heads=8, projection_dim=256, vocab_size=64)
    close(flops.clip(cfg, 77), xla(lambda p, x: clip_text.apply(cfg, p, x),
                                   clip_text.specs(cfg), jnp.zeros((B, 77), jnp.int32)))


def test_t5():
    cfg = t5_encoder.Config(d_model=512, d_ff=1024, d_kv=64, num_heads=6, num_layers=1,
                            vocab_size=64)
    close(flops.t5(cfg, 128), xla(lambda p, x: t5_encoder.apply(cfg, p, x),
                                  t5_encoder.specs(cfg), jnp.zeros((B, 128), jnp.int32)))


VISION = VisionConfig(depth=1, hidden_size=512, intermediate_size=1024, num_heads=8,
                      out_hidden_size=512, fullatt_block_indexes=())
QWEN = QwenConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=640, mrope_section=(8, 12, 12), image_token_id=1,
    video_token_id=2, vision_start_token_id=3, vision=VISION)


def test_language():
    def run(p, x, positions, mask):
        states, _ = language.apply(QWEN, p, x, positions, mask)
        return language.logits(QWEN, p, states)

    close(flops.language(QWEN, 128, logits=128),
          xla(run, qwen_weights.specs(QWEN), jnp.zeros((B, 128, 512)),
              jnp.zeros((3, B, 128), jnp.int32), jnp.ones((B, 128), bool)))


@pytest.mark.parametrize("full", [(), (0,)])
def test_vision(full):
    cfg = dataclasses.replace(VISION, fullatt_block_indexes=full)
    patches = np.zeros((16 * 16, 3 * 2 * 14 * 14), np.float32)
    pictures = vision.pack(cfg, [(patches, np.array([[1, 16, 16]]))] * B)
    close(flops.vision(cfg, pictures.patches.shape[1]),
          xla(lambda p, *a: vision.apply(cfg, p, vision.Pictures(*a)),
              qwen_weights.specs(QWEN)["vision"], *pictures))


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_autoencoder(side):
    cfg = autoencoder.Config(block_out_channels=(32, 64, 64), latent_channels=16,
                             layers_per_block=2, norm_num_groups=8, scaling_factor=1.0,
                             shift_factor=0.0)
    shape = (B, 128, 128, 3) if side == "encode" else (B, 32, 32, 16)
    theirs = xla(lambda p, x: getattr(autoencoder, side)(cfg, p, x), autoencoder.specs(cfg),
                 jnp.zeros(shape))
    # XLA leaves out the products with a convolution's padding, a few percent at this size.
    assert getattr(flops, side)(cfg, 128, 128) == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(("side", "edit", "tera"), [
    (512, False, 2.44), (512, True, 4.89), (1024, False, 11.2), (1024, True, 29.7)])
def test_full_size(side, edit, tera):
    cfg = mmdit.Config(
        num_layers=24, attention_head_dim=64, num_attention_heads=24, in_channels=16,
        out_channels=16, patch_size=2, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)))
    T = (side // 16)**2
    assert flops.transformer(cfg, T, 333, reference=T * edit) / 1e12 == pytest.approx(tera, rel=.01)


def test_training():
    assert flops.training(10, passed=4, frozen=1) == 39


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)])
def test_mfu(kind, peak):
    devices = [types.SimpleNamespace(device_kind=kind)] * 4
    assert flops.mfu(peak, devices) == pytest.approx(0.25)


def test_mfu_is_not_known_on_a_cpu():
    assert flops.mfu(1e12, jax.devices()) is None
