"""Answers about pictures: against the goldens and, live, against transformers' `generate`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

from unipic_jax.conditioning import qwen_chat
from unipic_jax.convert import load
from unipic_jax.core.errors import InputError
from unipic_jax.pipelines import describe
from unipic_jax.pipelines.describe import Options, Sampling

FOLDER = GOLDENS / "metaquery" / "qwen2_5_vl"
N = 24


@pytest.fixture(scope="module")
def model():
    """Chat, config and parameters, as `describe` takes them."""
    part = describe.open_model(FOLDER)
    return qwen_chat.open_chat(FOLDER), part.config, load.read(part, jnp.float32)


def picture(width, height, seed):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


def ask(text, *pictures):
    return {"role": "user", "content": [
        *({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def conversations():
    """Of very different lengths: two pictures of odd sizes, and a conversation without any."""
    return [[ask("what is on these pictures?", picture(90, 140, 0), picture(60, 57, 1))],
            [ask("hello"), {"role": "assistant", "content": "well"}, ask("why?")]]


@pytest.mark.parametrize(("size", "zoom"), [("small", 1), ("large", 2)])
def test_greedy_tokens_equal_golden(model, golden, size, zoom):
    source = Image.open(GOLDENS / "source.png")
    source = source.resize([zoom * side for side in source.size], Image.Resampling.NEAREST)
    answer, = describe.describe(*model, [[ask("describe the image in detail", source)]],
                                Options(max_new_tokens=12))
    assert answer.tokens == golden[f"understand/{size}/generated"][0].tolist()


@pytest.fixture(scope="module")
def theirs(model, conversations):
    """transformers' `generate` of both conversations as one batch, padded on the left."""
    import torch
    import transformers

    chat, cfg, _ = model
    net = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER).float().eval()
    prompts = qwen_chat.read(chat, cfg, conversations)
    S = prompts.mask.sum(1).max()
    ids, mask = np.full((2, 2, S), 473)
    for i, real in enumerate(prompts.mask):
        ids[i, S - real.sum():] = prompts.ids[i, real]
        mask[i] = np.arange(S) >= S - real.sum()
    patches, grid = qwen_chat.qwen_images.preprocess(
        chat.images, [c["image"] for c in conversations[0][0]["content"] if "image" in c])

    def generate(**options):
        out = net.generate(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            pixel_values=torch.from_numpy(patches), image_grid_thw=torch.from_numpy(grid),
            mm_token_type_ids=torch.from_numpy((ids == cfg.image_token_id).astype(np.int64)),
            do_sample=False, max_new_tokens=N, **options)
        return out[:, S:].tolist()

    return generate


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_generate_of_transformers(model, theirs, conversations, penalty):
    """A batch of two lengths; each row until its own end, which is put where one row meets it."""
    options = Options(max_new_tokens=N, repetition_penalty=penalty)
    answers = describe.describe(*model, conversations, options)
    want = theirs(repetition_penalty=penalty, eos_token_id=None)
    assert [a.tokens for a in answers] == want

    end = next(t for t in want[0][2:] if t not in want[1][:8])
    chat = dataclasses.replace(model[0], ends=(end,))
    answers = describe.describe(chat, *model[1:], conversations, options)
    ended = [row[:row.index(end) + 1] if end in row else row
             for row in theirs(repetition_penalty=penalty, eos_token_id=end, pad_token_id=end)]
    assert [a.tokens for a in answers] == ended
    assert len(ended[0]) < len(ended[1])


def test_a_row_is_the_same_alone_and_shown_as_it_grows(model, conversations):
    """Greedy and drawn; what is shown are beginnings, a few tokens more each time."""
    for options in (Options(max_new_tokens=N), Options(max_new_tokens=N, temperature=1.5)):
        whole = describe.describe(*model, conversations, options)
        shown = []
        assert describe.describe(*model, conversations, options, shown.append) == whole
        assert [len(s[0].tokens) for s in shown] == [1, 5, 9, 13, 17, 21, 24]
        for row, answer in enumerate(whole):
            assert all(answer.tokens[:len(s[row].tokens)] == s[row].tokens for s in shown)
        alone, = describe.describe(*model, conversations[:1], options)
        assert alone == whole[0]
    programs = describe.decode._cache_size()
    describe.describe(*model, conversations, options, shown.append)
    assert describe.decode._cache_size() == programs


def test_the_text_is_the_answer_alone(model, conversations):
    chat = dataclasses.replace(model[0], ends=(472,))
    answer = describe._answer(chat, np.array([65, 66, 472, 67]))
    assert answer.tokens == [65, 66, 472]
    assert answer.text == chat.tokenizer.decode([65, 66])


def test_seeds_draw_different_text(model, conversations):
    texts = [describe.describe(*model, conversations[1:],
                               Options(max_new_tokens=N, temperature=1.0, seed=seed))[0].text
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_end_stops_all_chunks(model, conversations):
    first = describe.describe(*model, conversations, Options(max_new_tokens=N))
    chat = dataclasses.replace(model[0], ends=tuple(a.tokens[2] for a in first))
    shown = []
    answers = describe.describe(chat, *model[1:], conversations, Options(max_new_tokens=N),
                                shown.append)
    assert all(len(a.tokens) <= 3 for a in answers)
    assert len(shown) == 2


def test_filters_equal_transformers():
    import torch
    import transformers as hf

    draw = np.random.default_rng(0)
    logits = draw.normal(size=(5, 40)).astype(np.float32) * 3
    said = draw.integers(0, 40, (5, 9))
    seen = np.zeros((5, 40), bool)
    seen[np.arange(5)[:, None], said] = True
    for penalty, temperature, top_p in ((1.05, 0.7, 0.9), (0.8, 1.6, 0.3), (2.0, 1.0, 1e-6),
                                        (1.0, 0.3, 0.99)):
        chain = hf.LogitsProcessorList([
            hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature),
            hf.TopPLogitsWarper(top_p)])
        want = chain(torch.from_numpy(said), torch.from_numpy(logits)).numpy()
        got = describe.penalize(logits, seen, penalty) / temperature
        got = np.asarray(describe.nucleus(got, top_p))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_draws_follow_the_filtered_distribution():
    n, V = 40_000, 12
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32) * 2
    sampling = Sampling(0.8, 0.85, 1.2, jax.random.key(0), np.array([0]))
    seen = np.arange(V) % 3 == 0
    tokens = describe.choose(sampling, jnp.tile(logits, (n, 1)), jnp.tile(seen, (n, 1)),
                             jax.random.key(3))
    p = describe.nucleus(describe.penalize(logits, seen, 1.2)[None] / 0.8, 0.85)[0]
    p = np.asarray(jax.nn.softmax(p))
    assert 2 < (p > 0).sum() < V
    frequency = np.bincount(tokens, minlength=V) / n
    assert not frequency[p == 0].any()
    assert np.abs(frequency - p).max() < 4 * (0.25 / n) ** 0.5


def test_the_folder_says_how_answers_end(tmp_path, model):
    assert (model[0].ends, model[0].repetition_penalty) == ((472, 473), 1.0)
    read = qwen_chat._read_generation
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 5}}')
    assert read(tmp_path) == ((5,), 1.0)
    (tmp_path / "config.json").write_text('{"eos_token_id": 6, "text_config": {}}')
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    assert read(tmp_path) == ((6,), 1.05)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read(tmp_path) == ((7, 8), 1.0)


def test_half_precision_answers(model, conversations):
    chat, cfg, _ = model
    params = load.read(describe.open_model(FOLDER), jnp.bfloat16)
    answers = describe.describe(chat, cfg, params, conversations[1:],
                                Options(max_new_tokens=4, dtype=jnp.dtype("bfloat16")))
    assert len(answers[0].tokens) == 4


@pytest.mark.parametrize("wrong", [
    {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1},
    {"repetition_penalty": 0.0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(InputError):
        Options(**wrong)


def test_another_model_is_refused():
    with pytest.raises(InputError, match=r"not a Qwen2\.5-VL"):
        describe.open_model(GOLDENS / "kontext" / "text_encoder")
