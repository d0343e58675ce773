"""What each stage minimizes, by hand and by transformers, on collated batches."""

import dataclasses

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

from unipic_jax.conditioning import kontext, metaquery, qwen_chat, qwen_images
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks
from unipic_jax.flow import schedule
from unipic_jax.model import read_part
from unipic_jax.models import autoencoder, mmdit
from unipic_jax.pipelines import describe
from unipic_jax.train import collate, objectives, stage

B = 3
GOLDEN_QWEN = GOLDENS / "metaquery/qwen2_5_vl"
KEYS = jax.random.split(jax.random.key(7), B)


def jit(f, **options):
    return jax.jit(f, compiler_options=micro.QUICK, **options)


@pytest.fixture(scope="module")
def edits():
    """Pictures of 16x16, as buckets cut them."""
    def small(a):
        return np.asarray(Image.fromarray(a).resize((16, 16)))

    found = [blocks.sample("edit", 0, i).example for i in range(B)]
    return [dataclasses.replace(e, target=small(e.target), source=small(e.source)) for e in found]


def opened(name, root):
    config = micro.point(micro.get_config(name), root)
    here = stage.open_stage(config)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    trained, frozen = stage.parameters(config, here, mesh)
    # Without a mesh from here on, as in the pipelines.
    trained, frozen = jax.tree.map(np.asarray, (trained, frozen))
    return here, trained, frozen


def sampled(cfg, params, pictures, keys):
    """Scaled latents by the book: (mean + deviation * noise - shift) * scale."""
    x = np.stack(pictures).astype(np.float32) / 127.5 - 1
    posterior = jit(autoencoder.encode, static_argnums=0)(cfg, params, x)
    noise = np.stack([jax.random.normal(k, posterior.mean.shape[1:]) for k in keys])
    z = posterior.mean + np.exp(0.5 * np.clip(posterior.logvar, -30, 20)) * noise
    return (z - cfg.shift_factor) * cfg.scaling_factor


@pytest.mark.parametrize("name", ["kontext", "unified"])
def test_velocity_equals_a_computation_by_hand(name, edits, micro_model):
    """The draws are the same; prompts go the pipelines' way, each at its own length."""
    here, trained, frozen = opened(name, micro_model)
    loss, more = jit(here.loss)(trained, frozen, here.collate["edit"](edits), KEYS)
    params = here.combine(trained, frozen)
    target, source, level, noise = zip(*(jax.random.split(k, 4) for k in KEYS))
    vae, cfg = here.parts["vae"].config, here.parts["transformer"].config
    x0 = sampled(vae, params["vae"], [e.target for e in edits], target)
    reference = sampled(vae, params["vae"], [e.source for e in edits], source)
    shift = here.parts["scheduler"].config.shift
    sigma = np.array([shift * u / (1 + (shift - 1) * u) for u in (
        jax.random.randint(k, (), 1, 1001) / 1000 for k in level)], np.float32)
    np.testing.assert_allclose(more["sigma"], sigma, rtol=1e-6)
    noise = np.stack([jax.random.normal(k, x0.shape[1:]) for k in noise])
    s = sigma[:, None, None, None]
    texts = [e.text for e in edits]
    if name == "kontext":
        ids = {n: kontext.tokenize(micro_model / "kontext", n, texts) for n in kontext.LENGTHS}
        condition = kontext.encode(here.parts, params.__getitem__, ids, jnp.float32)
    else:
        chat = qwen_chat.open_chat(here.parts["mllm"].folder)
        inputs = metaquery.prepare(chat, here.parts["mllm"].config, 4, texts,
                                   [Image.fromarray(e.source) for e in edits])
        assert inputs.ids.shape[1] != here.collate["edit"](edits)["prompt"]["ids"].shape[1]
        condition = jit(metaquery.apply, static_argnums=(0, 1), static_argnames="dtype")(
            here.parts["mllm"].config, here.parts["conditioner"].config, params["mllm"],
            params["conditioner"], inputs, dtype=jnp.float32)
    v = jit(mmdit.apply, static_argnums=0)(
        cfg, params["transformer"], (1 - s) * x0 + s * noise, sigma * 1000, **condition,
        reference=reference)
    want = np.square(v - (noise - x0)).mean((1, 2, 3))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert len(set(np.asarray(loss).round(4))) == B


def test_noise_levels_are_the_schedulers_all_as_likely(micro_model):
    cfg = read_part(micro_model / "kontext/scheduler").config
    assert cfg.shift == 6
    N, T, bins = 40_000, 1000, 50
    drawn = np.asarray(schedule.draw(cfg, jax.random.split(jax.random.key(0), N)), np.float64)
    index = drawn / (6 - 5 * drawn) * T  # the shift undone
    assert np.abs(index - index.round()).max() < 1e-3
    assert (index.round().min(), index.round().max()) == (1, T)
    counts, _ = np.histogram(index.round(), bins, (0.5, T + 0.5))
    chi_square = np.square(counts - N / bins).sum() / (N / bins)
    assert chi_square < 85.4  # which 1 in 1000 exceeds, of 49 degrees of freedom
    assert abs(np.median(drawn) - 6 / 7) < 0.01


def test_reconstruction_equals_a_computation_by_hand(edits, micro_model):
    here, trained, frozen = opened("reconstruction", micro_model)
    loss, more = jit(here.loss)(trained, frozen, here.collate["generate"](edits), KEYS)
    cfg, params = here.parts["vae"].config, here.combine(trained, frozen)["vae"]
    x = np.stack([e.target for e in edits]).astype(np.float32) / 127.5 - 1
    posterior = jit(autoencoder.encode, static_argnums=0)(cfg, params, x)
    noise = np.stack([jax.random.normal(k, posterior.mean.shape[1:]) for k in KEYS])
    z = posterior.mean + np.exp(0.5 * posterior.logvar) * noise
    error = np.asarray(jit(autoencoder.decode, static_argnums=0)(cfg, params, z)) - x
    m, v = np.asarray(posterior.mean), np.exp(posterior.logvar)
    divergence = 0.5 * (m**2 + v - 1 - np.log(v)).sum((1, 2, 3))
    absolute = np.abs(error).mean((1, 2, 3))
    want = absolute + np.square(error).mean((1, 2, 3)) + 3e-4 * divergence / x[0].size
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(more["absolute"], absolute, rtol=1e-5)


# Questions and answers, on the golden language model.

TOKENS = 160  # of a question and its answer; the golden tokenizer spells them out


@pytest.fixture(scope="module")
def asked():
    return [blocks.sample("describe", 3, i, kind=kind).example
            for i, kind in enumerate(("describe", "content", "count"))]


@pytest.fixture(scope="module")
def golden_qwen():
    part = describe.open_model(GOLDEN_QWEN)
    params = jax.tree.map(jnp.asarray, stage.load.read(part, jnp.float32))
    return part, params, collate.Answers(GOLDEN_QWEN, part.config, TOKENS)


@pytest.fixture(scope="module")
def answers(golden_qwen, asked):
    """(collated batch, its loss and accuracy)."""
    part, params, rows = golden_qwen
    batch = rows(asked)
    run = jit(lambda params, batch: objectives.answer(
        {"mllm": part}, {"mllm": params}, batch, KEYS, dtype=jnp.float32, remat="none"))
    return batch, run, *run(params, batch)


def test_blank_answers_are_not_read(golden_qwen, answers):
    """Tokens that are in answers alone get a gradient as what is said, and none as what is read."""
    part, params, _ = golden_qwen
    batch, *_ = answers

    def loss(params, blank):
        return objectives.answer({"mllm": part}, {"mllm": params}, batch, KEYS, dtype=jnp.float32,
                                 remat="none", blank=blank)[0].sum()

    ids, said = batch["prompt"]["ids"], batch["answers"]
    alone = np.setdiff1d(ids[said], ids[~said])
    rows = [np.abs(jax.grad(loss)(params, blank)["token"][alone]).max(1) for blank in (0.0, 1.0)]
    assert (rows[0] > 0).any()
    assert (rows[1] == 0).all()


def test_loss_of_answers_equals_transformers(golden_qwen, asked, answers):
    import torch
    import transformers

    part, _, _ = golden_qwen
    batch, _, loss, _ = answers
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        GOLDEN_QWEN).float().eval()
    chat = qwen_chat.open_chat(GOLDEN_QWEN)
    for i, example in enumerate(asked):
        length = batch["prompt"]["mask"][i].sum()
        ids = torch.tensor(batch["prompt"]["ids"][i:i + 1, :length], dtype=torch.long)
        said = torch.tensor(batch["answers"][i:i + 1, :length])
        patches, grid = qwen_images.preprocess(chat.images, [Image.fromarray(example.source)])
        with torch.no_grad():
            want = theirs(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor(grid),
                mm_token_type_ids=(ids == part.config.image_token_id).int(),
                labels=torch.where(said, ids, -100)).loss
        np.testing.assert_allclose(loss[i], want, rtol=1e-5)


def test_what_is_to_be_said_is_what_describe_would_have_to_say(golden_qwen, asked, answers):
    part, _, _ = golden_qwen
    batch = answers[0]
    chat = qwen_chat.open_chat(GOLDEN_QWEN)
    for i, example in enumerate(asked):
        prompt = qwen_chat.read(chat, part.config, [[{"role": "user", "content": [
            {"type": "image", "image": Image.fromarray(example.source)},
            {"type": "text", "text": example.text}]}]])
        ids, said = batch["prompt"]["ids"][i], batch["answers"][i]
        begin = prompt.mask.sum()
        np.testing.assert_array_equal(ids[:begin], prompt.ids[0, :begin])
        assert not said[:begin].any()
        tokens = ids[said]
        assert said[begin:begin + len(tokens)].all()
        assert tokens[-1] in chat.ends
        assert not np.isin(tokens[:-1], chat.ends).any()
        assert describe._answer(chat, tokens).text == example.answer


def test_turns_are_put_as_the_chat_template_does_while_they_fit(golden_qwen, asked):
    part, _, rows = golden_qwen
    chat = qwen_chat.open_chat(GOLDEN_QWEN)
    turns = (("Why?", "yes"), ("Where?", "in"), ("What is it, " + "x" * TOKENS, "no"))
    batch = rows([dataclasses.replace(asked[1], turns=turns)])
    ids = batch["prompt"]["ids"][0, batch["prompt"]["mask"][0]]
    talk = [{"role": "user", "content": [
        {"type": "image", "image": Image.fromarray(asked[1].source)},
        {"type": "text", "text": asked[1].text}]},
        {"role": "assistant", "content": asked[1].answer}]
    for question, answer in turns[:2]:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    # What is rendered goes on to the next answer; here it ends with the last one.
    want = qwen_chat.read(chat, part.config, [talk])
    want = want.ids[0, want.mask[0]]
    np.testing.assert_array_equal(ids, want[:len(ids)])
    assert chat.tokenizer.decode(want[len(ids):]) == "\n<|im_start|>assistant\n"
    said = chat.tokenizer.decode(batch["prompt"]["ids"][0, batch["answers"][0]])
    assert said.split("<|im_end|>") == [asked[1].answer, "yes", "in", ""]


def test_accuracy_counts_answers_that_are_right_at_every_token(golden_qwen, answers):
    """With what the model itself likes best in the place of the answers, it is 1 a row."""
    part, params, _ = golden_qwen
    batch, run, _, more = answers
    assert not np.any(more["accuracy"])
    liked = {"prompt": batch["prompt"] | {"ids": batch["prompt"]["ids"].copy()},
             "answers": np.zeros_like(batch["answers"])}
    likeliest = jit(lambda params, prompt: logits(part.config, params, prompt).argmax(-1))
    for i, row in enumerate(batch["answers"]):
        liked["answers"][i, row.argmax()] = True  # the first token; those after it depend on it
        liked["prompt"]["ids"][i, row.argmax()] = likeliest(params, batch["prompt"])[
            i, row.argmax() - 1]
    _, more = run(params, liked)
    np.testing.assert_array_equal(more["accuracy"], 1)
    liked["prompt"]["ids"][1, batch["answers"][1].argmax()] += 1
    _, more = run(params, liked)
    np.testing.assert_array_equal(more["accuracy"], [1, 0, 1])


def logits(cfg, params, prompt):
    inputs = objectives.chat_inputs(prompt)
    x = objectives.qwen.embed(cfg, params, inputs.ids, inputs.pictures, jnp.float32)
    states, _ = objectives.language.apply(cfg, params, x, inputs.positions, inputs.mask)
    return objectives.language.logits(cfg, params, states)


# Shapes.


def shapes(batch):
    return jax.tree.map(jnp.shape, batch)


def test_shapes_do_not_depend_on_texts(edits, asked, micro_model, golden_qwen):
    here, *_ = opened("unified", micro_model)
    plain, *_ = opened("kontext", micro_model)
    long = "a red circle to the left of a blue square " * 20
    for texts in (["", "a", long], [long] * 3):
        said = [dataclasses.replace(e, text=t) for e, t in zip(edits, texts)]
        for rows in (here.collate["edit"], plain.collate["edit"]):
            assert shapes(rows(said)) == shapes(rows(edits))
        questions = [dataclasses.replace(e, text=t, answer="no") for e, t in zip(asked, texts)]
        rows = golden_qwen[2]
        assert shapes(rows(questions)) == shapes(rows(asked))


def test_long_texts_are_cut_at_the_same_token(edits, micro_model):
    here, *_ = opened("unified", micro_model)
    chat = qwen_chat.open_chat(here.parts["mllm"].folder)
    words = "red blue green square circle " * 20
    limit = here.collate["edit"].text_tokens
    cut = chat.tokenizer.decode(chat.tokenizer(words).input_ids[:limit])
    assert words.startswith(cut)
    assert len(chat.tokenizer(cut).input_ids) == limit
    one, other = (here.collate["edit"]([dataclasses.replace(edits[0], text=t)])["prompt"]
                  for t in (words, cut))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_answer_that_is_too_long_is_named(asked, golden_qwen):
    long = dataclasses.replace(asked[0], name="row 7", answer="no " * TOKENS)
    with pytest.raises(InputError, match=r"row 7: its answer has \d+ tokens, more than 160"):
        golden_qwen[2]([long])
