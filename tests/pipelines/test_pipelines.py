"""Whole pictures: against the goldens, and what a user of several pictures expects."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, first, last, relative
from PIL import Image

from unipic_jax.core import images
from unipic_jax.core.errors import InputError
from unipic_jax.flow import schedule
from unipic_jax.flow.guidance import SkipLayer
from unipic_jax.pipelines import edit, generate
from unipic_jax.pipelines.generate import Options

SIX = Options(steps=6)


@pytest.fixture(scope="module")
def parts():
    return generate.open_model(GOLDENS / "kontext")


@pytest.fixture(scope="module")
def source():
    return images.open_picture(GOLDENS / "source.png")


def draw(parts, golden, meta, prompts=None, latents="kontext_t2i/init_latents", **options):
    h, w = meta["t2i_size_hw"]
    latents = last(golden[latents]) if latents else None
    return generate.generate(parts, prompts or [meta["prompt"]], height=h, width=w,
                             latents=latents, options=dataclasses.replace(SIX, **options))


def test_text_to_image_equals_golden(parts, golden, meta):
    drawn = draw(parts, golden, meta)
    assert relative(first(drawn.latents), golden["kontext_t2i/latent"]) < 1e-5
    assert np.abs(drawn.pictures - golden["kontext_t2i/np"]).max() < 1e-4


def test_progress_changes_nothing(parts, golden, meta, capfd):
    drawn = draw(parts, golden, meta, progress=True)
    assert relative(first(drawn.latents), golden["kontext_t2i/latent"]) < 1e-5
    assert "6/6" in capfd.readouterr().err


def test_without_guidance_equals_golden(parts, golden, meta):
    drawn = draw(parts, golden, meta, guidance_scale=1.0)
    assert relative(first(drawn.latents), golden["kontext_t2i/no_cfg_latent"]) < 1e-5


def test_skip_layer_guidance_equals_golden(parts, golden, meta):
    """The golden was made at guidance 4 and acts in the steps 1, 2 and 3 of 10."""
    drawn = draw(parts, golden, meta, steps=10, guidance_scale=4.0,
                 skip=SkipLayer((1, 2), stop=0.4))
    assert relative(first(drawn.latents), golden["kontext_t2i/slg_latent"]) < 1e-5


def test_edit_equals_golden(parts, golden, meta, source):
    drawn = edit.edit(parts, [source], [meta["edit_prompt"]], meta["negative_prompt"],
                      image_size=meta["edit_image_size"], options=SIX,
                      latents=last(golden["kontext_edit/init_latents"]),
                      reference_noise=last(golden["edit/posterior_noise"]))
    assert relative(first(drawn.latents), golden["kontext_edit/latent"]) < 1e-5
    assert np.abs(drawn.pictures - golden["kontext_edit/np"]).max() < 1e-4


def test_skip_layer_guidance_keeps_the_reference_unless_told(parts, golden, kontext, mmdit_apply):
    """One step by hand, from separate calls of the transformer."""
    cfg, params = kontext["transformer"]
    x, ref = last(golden["mmdit/edit/latents"])[:1], last(golden["mmdit/edit/ref"])[:1]
    context, pooled = golden["mmdit/edit/context"], golden["mmdit/edit/pooled"]
    sigmas = schedule.sigmas(schedule.Config(1000, 3.0), 20)[5 - 3:7 - 3]  # 1 < i = 3 < 4

    def v(row, reference, skip=()):
        return np.asarray(mmdit_apply(cfg, params, x, np.full(1, 1000 * sigmas[0], np.float32),
                                      context[row:row + 1], pooled[row:row + 1], reference,
                                      skip_layers=skip))

    n, p = v(0, ref), v(1, ref)
    condition = [{"context": jnp.asarray(context[i:i + 1]), "pooled": jnp.asarray(pooled[i:i + 1]),
                  "reference": jnp.asarray(ref)} for i in range(2)]
    for forgets in (False, True):
        want = n + 3.5 * (p - n) + 2.8 * (p - v(1, None if forgets else ref, (1, 2)))
        want = x + (sigmas[1] - sigmas[0]) * want
        got = generate.denoise(cfg, params, x, sigmas=sigmas, first=3, positive=condition[1],
                               negative=condition[0], scale=3.5, steps=20, skip=SkipLayer((1, 2)),
                               skip_forgets_reference=forgets)
        assert relative(got, want) < 1e-6


def test_a_batch_is_its_pictures_one_by_one(parts, golden, meta):
    """Several prompts, several pictures a prompt: each its own noise, none disturbs another."""
    prompts = [meta["prompt"], "a blue circle"]
    batch = draw(parts, golden, meta, prompts, latents=None, steps=2, images_per_prompt=2).latents
    assert batch.shape[0] == 4
    assert relative(batch[0], batch[1]) > 0.1  # another noise
    assert relative(batch[0], batch[2]) > 0.1  # another prompt and noise
    again = draw(parts, golden, meta, prompts, latents=None, steps=2, images_per_prompt=2).latents
    assert np.array_equal(batch, again)
    other = draw(parts, golden, meta, prompts, latents=None, steps=2, images_per_prompt=2, seed=7)
    assert relative(other.latents, batch) > 0.1
    one = draw(parts, golden, meta, prompts[:1], latents=None, steps=2, images_per_prompt=2).latents
    assert relative(batch[:2], one) < 1e-5
    shape = generate.latent_shape(parts, 4, *meta["t2i_size_hw"])
    noise = np.asarray(generate.initial_latents(shape, 42, None))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_the_reference_is_the_mode_unless_sampled(parts, meta, source):
    def run(**kw):
        return edit.edit(parts, [source], ["a hat"], image_size=64,
                         options=Options(steps=1, images_per_prompt=2), **kw).latents
    mode, sampled = run(), run(sample_reference=True)
    assert np.array_equal(mode, run())
    assert np.array_equal(sampled, run(sample_reference=True))
    assert relative(sampled, mode) > 1e-3
    assert mode.shape[0] == 2


def test_bfloat16_draws_the_same_picture_about(parts, golden, meta):
    drawn = draw(parts, golden, meta, dtype=jnp.dtype("bfloat16"))
    assert drawn.latents.dtype == np.float32
    assert 1e-4 < relative(first(drawn.latents), golden["kontext_t2i/latent"]) < 0.05


def test_what_does_not_fit_is_refused(parts, source):
    def refused(message, f, *args, **kw):
        with pytest.raises(InputError, match=message):
            f(*args, **kw)

    refused("height 500 is not a multiple of 16", generate.generate, parts, ["a"], height=500)
    refused("positions reach to 384", generate.generate, parts, ["a"], height=512, width=64)
    refused(r"shape \[1, 16, 4, 4\] are given where \[1, 16, 8, 6\]", generate.generate, parts,
            ["a"], height=64, width=48, latents=np.zeros((1, 4, 4, 16)))
    refused("skip layer 9 is not one", generate.generate, parts, ["a"], height=64, width=48,
            options=Options(steps=1, skip=SkipLayer((9,))))
    refused("image size 100 is not a multiple", edit.edit, parts, [source], ["a"], image_size=100)
    refused("different sizes", edit.edit, parts, [source, Image.new("RGB", (40, 90))], ["a", "b"],
            image_size=64)
    refused("1 pictures for 2 prompts", edit.edit, parts, [source], ["a", "b"])
