"""MetaQuery's pictures against the goldens; edits in turns, guidance by the picture, and that
training what steers the pictures leaves the language model alone."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, first, last, relative
from PIL import Image

from unipic_jax.conditioning import metaquery, qwen_chat
from unipic_jax.core import images
from unipic_jax.core import params as params_lib
from unipic_jax.core.errors import InputError
from unipic_jax.flow.loss import velocity_loss
from unipic_jax.models import mmdit
from unipic_jax.pipelines import describe, edit, generate
from unipic_jax.pipelines.generate import Options

KONTEXT = GOLDENS / "kontext"
MLLM, CONDITIONER = (GOLDENS / "metaquery" / n for n in ("qwen2_5_vl", "conditioner"))
SIX, TWO = Options(steps=6), Options(steps=2)


@pytest.fixture(scope="module")
def parts():
    return generate.open_model(KONTEXT, MLLM, CONDITIONER, keep=True)


@pytest.fixture(scope="module")
def source():
    return images.open_picture(GOLDENS / "source.png")


def test_text_to_image_equals_golden(parts, golden, meta):
    h, w = meta["t2i_size_hw"]
    drawn = generate.generate(parts, [meta["prompt"]], height=h, width=w, options=SIX,
                              latents=last(golden["metaquery_t2i/init_latents"]))
    assert relative(first(drawn.latents), golden["metaquery_t2i/latent"]) < 1e-5
    assert np.abs(drawn.pictures - golden["metaquery_t2i/np"]).max() < 1e-4


def golden_edit(parts, golden, meta, source, options):
    return edit.edit(parts, [source], [meta["edit_prompt"]], meta["negative_prompt"],
                     image_size=meta["edit_image_size"], options=options,
                     latents=last(golden["metaquery_edit/init_latents"]),
                     reference_noise=last(golden["edit/posterior_noise"]))


def test_edit_equals_golden(parts, golden, meta, source):
    drawn = golden_edit(parts, golden, meta, source, SIX)
    assert relative(first(drawn.latents), golden["metaquery_edit/latent"]) < 1e-5
    assert np.abs(drawn.pictures - golden["metaquery_edit/np"]).max() < 1e-4


def test_image_guidance_at_one_is_the_plain_edit(parts, golden, meta, source):
    """b + 1 (n - b) + s (p - n); at another scale it is another picture."""
    one, more = (golden_edit(parts, golden, meta, source, dataclasses.replace(
        SIX, image_guidance_scale=scale, progress=True)) for scale in (1.0, 2.0))
    assert relative(first(one.latents), golden["metaquery_edit/latent"]) < 1e-5
    assert relative(more.latents, one.latents) > 1e-2


def test_a_step_of_image_guidance_by_hand(parts, golden, kontext, mmdit_apply):
    """The blank condition has no reference, and the language model sees black for it."""
    cfg, params = kontext["transformer"]
    picture = Image.fromarray(golden["edit/resized"])
    options = Options(image_guidance_scale=1.6)
    conditions = generate.encode_prompts(parts, ["a hat"], "bad", options, [picture])
    black = Image.new("RGB", picture.size)
    want = metaquery.encode(parts, ["a hat", "bad", "bad"], [picture, picture, black], jnp.float32)
    for i, condition in enumerate(conditions):
        assert relative(condition["context"], want["context"][i:i + 1]) < 1e-6
    x = jax.random.normal(jax.random.key(0), (1, 12, 16, 16))
    reference = jax.random.normal(jax.random.key(1), x.shape)
    conditions = [c | r for c, r in zip(conditions, [{"reference": reference}] * 2 + [{}])]
    sigmas = np.array([0.7, 0.6], np.float32)
    p, n, b = (np.asarray(mmdit_apply(cfg, params, x, np.full(1, 700, np.float32), **c))
               for c in conditions)
    got = generate.denoise(
        cfg, params, x, sigmas=sigmas, first=0, scale=3.5, image_scale=1.6, steps=1,
        dtype=jnp.dtype("float32"), **dict(zip(generate.Conditions._fields, conditions)))
    assert relative(got, x + (sigmas[1] - sigmas[0]) * (b + 1.6 * (n - b) + 3.5 * (p - n))) < 1e-6


def test_a_batch_is_its_edits_one_by_one(parts, source):
    """Two pictures, each with its own negative row; several pictures a prompt."""
    other = Image.fromarray(255 - np.asarray(source))
    both = edit.edit(parts, [source, other], ["a hat", "green"], image_size=64,
                     options=dataclasses.replace(TWO, images_per_prompt=2))
    noise = np.asarray(generate.initial_latents((4, *both.latents.shape[1:]), 42, None))
    for i, (picture, prompt) in enumerate([(source, "a hat"), (other, "green")]):
        alone = edit.edit(parts, [picture], [prompt], image_size=64, options=TWO,
                          latents=noise[2 * i + 1:2 * i + 2])
        assert relative(both.latents[2 * i + 1:2 * i + 2], alone.latents) < 1e-5


def test_turns_are_edits_of_edits(parts, source):
    turns = edit.edit_in_turns(parts, source, ["a hat", "green"], image_size=64, options=TWO)
    picture = source
    for i, prompt in enumerate(("a hat", "green")):
        one = edit.edit(parts, [picture], [prompt], image_size=64, options=TWO)
        np.testing.assert_array_equal(turns.latents[i], one.latents[0])
        picture = images.to_picture(one.pictures[0])
    with pytest.raises(InputError, match="one picture each"):
        edit.edit_in_turns(parts, source, ["a"], options=Options(images_per_prompt=2))


def test_the_conditioner_may_lie_in_the_model(tmp_path, parts):
    model = tmp_path / "model"
    shutil.copytree(KONTEXT, model, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    with pytest.raises(InputError, match="text_encoder is missing"):
        generate.open_model(model)
    with pytest.raises(InputError, match="conditioner is missing"):
        generate.open_model(model, MLLM)
    shutil.copytree(CONDITIONER, model / "conditioner")
    with pytest.raises(InputError, match="give its language model by --mllm"):
        generate.open_model(model)
    assert generate.open_model(model, MLLM)["conditioner"].config == parts["conditioner"].config


def test_parts_that_do_not_fit_are_refused(tmp_path):
    for key, value in (("llm_hidden_size", 32), ("joint_attention_dim", 95),
                       ("pooled_projection_dim", 41)):
        raw = json.loads((CONDITIONER / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
        with pytest.raises(InputError, match=f"its {key} is {value} where"):
            generate.open_model(KONTEXT, MLLM, tmp_path)
    with pytest.raises(InputError, match=r"not a Qwen2\.5-VL"):
        generate.open_model(KONTEXT, KONTEXT / "text_encoder", CONDITIONER)
    with pytest.raises(InputError, match="not a conditioner"):
        generate.open_model(KONTEXT, MLLM, KONTEXT / "vae")
    with pytest.raises(InputError, match="needs a language model"):
        generate.open_model(KONTEXT, None, CONDITIONER)
    with pytest.raises(InputError, match="one or the other"):
        Options(skip=generate.guidance.SkipLayer((1,)), image_guidance_scale=2.0)


def test_training_leaves_the_language_model_as_it_was(parts, source):
    """A step on the velocity loss, through Qwen, for the conditioner and the transformer: they
    change, and neither Qwen's weights nor what it says do."""
    import optax

    chat = qwen_chat.open_chat(MLLM)
    cfgs = {n: parts[n].config for n in ("mllm", "conditioner", "transformer")}
    qwen = parts.load("mllm", jnp.float32)
    before = jax.tree.map(np.array, qwen)
    question = [[{"role": "user", "content": [{"type": "image", "image": source},
                                              {"type": "text", "text": "what is it?"}]}]]

    def say():
        return describe.describe(chat, cfgs["mllm"], qwen, question,
                                 describe.Options(max_new_tokens=8))

    said = say()
    # One block is as good as four, and compiles faster.
    cfgs["transformer"] = dataclasses.replace(cfgs["transformer"], num_layers=1,
                                              dual_attention_layers=())
    weights = params_lib.init(mmdit.specs(cfgs["transformer"]), jax.random.key(1))
    trained = {"conditioner": parts.load("conditioner", jnp.float32),
               "transformer": jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(
                   a.shape), weights)}
    inputs = metaquery.prepare(chat, cfgs["mllm"], cfgs["conditioner"].num_queries, ["a hat"])
    x0, noise = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 16))

    optimizer = optax.sgd(1.0)

    @jax.jit
    def step(trained, qwen):
        def loss(trained):
            condition = metaquery.apply(cfgs["mllm"], cfgs["conditioner"], qwen,
                                        trained["conditioner"], inputs)
            return velocity_loss(lambda x, sigma: mmdit.apply(
                cfgs["transformer"], trained["transformer"], x, 1000 * sigma, **condition),
                x0, noise, jnp.array([0.6])).mean()
        updates, _ = optimizer.update(jax.grad(loss)(trained), optimizer.init(trained))
        return optax.apply_updates(trained, updates)

    after = step(trained, qwen)
    for path in (("conditioner", "queries"), ("conditioner", "project_in", "kernel"),
                 ("conditioner", "context", "bias"), ("transformer", "context", "kernel")):
        old, new = (functools.reduce(dict.__getitem__, path, t) for t in (trained, after))
        assert (old != new).mean() > 0.9, path
    assert jax.tree.all(jax.tree.map(np.array_equal, before, qwen))
    assert say() == said
