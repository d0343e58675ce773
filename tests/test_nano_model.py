"""The nano family's description: what is committed, and that everything opens it."""

import importlib.util

import numpy as np
import pytest
import transformers
from conftest import ROOT
from PIL import Image

from unipic_jax.conditioning import kontext, qwen_chat
from unipic_jax.conditioning.metaquery import PREFIX, prepare
from unipic_jax.conditioning.tokenizers import open_tokenizer
from unipic_jax.data import blocks
from unipic_jax.model import read_part
from unipic_jax.models.qwen2_5_vl import vision

NANO = ROOT / "configs/nano/model"
QWEN = NANO / "metaquery/qwen2_5_vl"


@pytest.fixture(scope="module")
def make_model():
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "configs/nano/make_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples():
    """Other ones than those that the tokenizers were made from."""
    return {task: list(blocks.Source(task, 99, 400)) for task in blocks.KINDS}


def test_what_is_committed_is_what_is_made(make_model, tmp_path):
    make_model.make(tmp_path / "model")
    made, kept = ({str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
                  for root in (tmp_path / "model", NANO))
    # Weights may lie beside them.
    kept = {name: content for name, content in kept.items() if not name.endswith(".safetensors")}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_all_parts_fit_in_16_megabytes(make_model):
    counts = make_model.counts(NANO)
    assert set(counts) == {
        "kontext/transformer", "kontext/vae", "kontext/text_encoder", "kontext/text_encoder_2",
        "kontext/text_encoder_3", "metaquery/conditioner", "metaquery/qwen2_5_vl", "judge"}
    assert sum(counts.values()) + counts["kontext/transformer"] < 7.9e6
    assert 1e6 < counts["kontext/transformer"] < 4e6


@pytest.mark.parametrize("encoder", kontext.LENGTHS)
def test_each_word_of_the_world_is_one_token(encoder, examples):
    folder = NANO / "kontext"
    texts = [e.text for task in ("generate", "edit") for e in examples[task]]
    ids = kontext.tokenize(folder, encoder, texts)
    assert ids.shape == (len(texts), 24)
    tokenizer = open_tokenizer(folder / encoder.replace("text_encoder", "tokenizer"))
    ends = 1 if encoder == kontext.T5 else 2
    lengths = [len(row) for row in tokenizer(texts).input_ids]
    assert lengths == [len(text.split()) + ends for text in texts]
    assert max(lengths) <= 24
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert ids.max() < read_part(folder / encoder).config.vocab_size
    # What is not of the world is spelled.
    spelled = tokenizer.decode(tokenizer("zebra no. 7").input_ids, skip_special_tokens=True)
    assert spelled.replace(" ", "") == "zebrano.7"


@pytest.mark.parametrize(("name", "cls"), [
    ("kontext/tokenizer", "CLIPTokenizer"), ("kontext/tokenizer_2", "CLIPTokenizer"),
    ("kontext/tokenizer_3", "T5Tokenizer"), ("kontext/tokenizer_3", "AutoTokenizer"),
    ("metaquery/qwen2_5_vl", "Qwen2Tokenizer")])
def test_the_released_tokenizer_classes_give_the_same_ids(name, cls, examples):
    theirs = getattr(transformers, cls).from_pretrained(NANO / name)
    texts = [e.text for es in examples.values() for e in es] + ["", "Zebra no. 7,  two\nlines é"]
    ours = open_tokenizer(NANO / name)
    assert theirs(texts).input_ids == ours(texts).input_ids
    assert theirs.pad_token_id == ours.pad_token_id


def test_language_model_reads_words_and_pictures(examples):
    chat, part = qwen_chat.open_chat(QWEN), read_part(QWEN)
    assert chat.ends == tuple(chat.tokenizer(["<|im_end|><|endoftext|>"]).input_ids[0])
    assert max(chat.tokenizer.get_vocab().values()) + 1 == part.config.vocab_size
    for task, es in examples.items():
        for e in es:
            for text in filter(None, (e.text, e.answer)):
                marks = sum(text.count(mark) for mark in "?.,")
                assert len(chat.tokenizer(text).input_ids) == len(text.split()) + marks, text
            if task == "generate":
                ids = chat.tokenizer(PREFIX + e.text).input_ids
                assert len(ids) == len(e.text.split()) + 4
    asked = next(e for e in examples["describe"] if e.target is None)
    picture = Image.fromarray(asked.source)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": asked.text}]
    read = qwen_chat.read(chat, part.config, [[{"role": "user", "content": content}]])
    assert (read.ids == part.config.image_token_id).sum() == 9
    assert read.grids[0].tolist() == [[1, 6, 6]]
    assert vision.count_windows(part.config.vision, read.grids[0]) == 4
    edit = examples["edit"][0]
    inputs = prepare(chat, part.config, 16, [edit.text], [Image.fromarray(edit.source)])
    assert (inputs.ids == part.config.image_token_id).sum() == 9
    assert np.all(inputs.mask[:, -16:])
