"""The text encoders against transformers, over activations, end tokens and lengths."""

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import relative
from flax import traverse_util

from unipic_jax.convert import names
from unipic_jax.models import clip_text, t5_encoder


def converted(module, cfg, state):
    """Our parameters from a PyTorch state dict, by the table; every tensor of it is used."""
    params, used = {}, set()
    for rule in names.rules(module, cfg):
        used |= set(rule.names)
        arrays = [names.FORMS[rule.form][0](state[n].numpy()) for n in rule.names]
        params[rule.path] = np.stack(arrays) if rule.stacked else arrays[0]
    assert used == {names.canonical(module, n) for n in state}
    return traverse_util.unflatten_dict(params)


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 2), ("gelu", 2), ("gelu", 55)])
def test_clip_equals_transformers(act, eos):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=12, hidden_act=act, projection_dim=16,
        eos_token_id=eos)
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cfg = clip_text.Config(24, 40, 3, 4, 16, 60, 12, act, eos_token_id=eos)
    ids = torch.randint(0, 54, (3, 12))
    ids[0, 4], ids[1, 11], ids[2, 7:] = (59 if eos == 2 else eos), 59, eos
    with torch.no_grad():
        want = theirs(input_ids=ids, output_hidden_states=True)
    state = {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k}
    params = converted(clip_text, cfg, state)
    states, pooled = jax.jit(clip_text.apply, static_argnums=0)(cfg, params, ids.numpy())
    assert relative(states, want.hidden_states[-2]) < 1e-5
    assert relative(pooled, want.text_embeds) < 1e-5


@pytest.mark.parametrize("length", [7, 300])
def test_t5_equals_transformers(length):
    """At 300 tokens the relative distance passes its maximum of 128."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3,
        feed_forward_proj="gated-gelu")
    theirs = transformers.T5EncoderModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cfg = t5_encoder.Config(24, 40, 8, 3, 3, 50)
    ids = torch.randint(0, 50, (2, length))
    with torch.no_grad():
        want = theirs(input_ids=ids).last_hidden_state
    params = converted(t5_encoder, cfg, theirs.state_dict())
    out = jax.jit(t5_encoder.apply, static_argnums=0)(cfg, params, ids.numpy())
    assert relative(out, want) < 1e-5
