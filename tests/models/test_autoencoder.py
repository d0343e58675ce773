"""The autoencoder against the goldens and against diffusers, at other depths too."""

import jax
import numpy as np
import pytest
import torch
from conftest import first, last, relative
from diffusers import AutoencoderKL
from flax import traverse_util

from unipic_jax.convert import names
from unipic_jax.models import autoencoder

encode = jax.jit(autoencoder.encode, static_argnums=0)
decode = jax.jit(autoencoder.decode, static_argnums=0)


def test_encode_equals_golden(golden, kontext):
    posterior = encode(*kontext["vae"], last(golden["vae/image"]))
    assert relative(first(posterior.mean), golden["vae/mean"]) < 1e-5
    assert relative(first(posterior.logvar), golden["vae/logvar"]) < 1e-5


def test_decode_equals_golden(golden, kontext):
    out = decode(*kontext["vae"], last(golden["vae/z"]))
    assert relative(first(out), golden["vae/decoded"]) < 1e-5


@pytest.mark.parametrize("widths", [(8, 16), (8, 8, 24), (8, 8, 16, 16, 24)])
def test_any_number_of_levels_equals_diffusers(widths):
    torch.manual_seed(0)
    n = len(widths)
    theirs = AutoencoderKL(
        block_out_channels=widths, layers_per_block=1, latent_channels=6, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.1)
    cfg = autoencoder.Config.from_json(
        {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items()}, "config")
    assert cfg.factor == 2 ** (n - 1)
    state = theirs.state_dict()
    params = {}
    for rule in names.rules(autoencoder, cfg):
        params[rule.path] = names.FORMS[rule.form][0](state[rule.names[0]].numpy())
    assert len(params) == len(state)
    params = traverse_util.unflatten_dict(params)
    picture = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(first(picture))).latent_dist
        z = torch.randn(2, 6, 32 // cfg.factor, 48 // cfg.factor)
        picture_back = theirs.decode(z).sample
    ours = encode(cfg, params, picture)
    assert relative(first(ours.mean), posterior.mean) < 1e-5
    assert relative(first(ours.logvar), posterior.logvar) < 1e-5
    assert relative(first(decode(cfg, params, last(z))), picture_back) < 1e-5


def test_posterior_sample_equals_golden(golden, kontext):
    cfg, params = kontext["vae"]
    picture = golden["edit/resized"].astype(np.float32)[None] / 255 * 2 - 1
    posterior = encode(cfg, params, picture)
    z = posterior.sample(last(golden["edit/posterior_noise"]))
    assert relative(first(z), golden["edit/posterior_sample"]) < 1e-5
    assert relative(autoencoder.unscale(cfg, autoencoder.scale(cfg, z)), z) < 1e-6
