"""Token ids, joint context and pooled vector against the goldens."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, relative

from unipic_jax.conditioning import kontext
from unipic_jax.core.errors import InputError
from unipic_jax.pipelines import generate

FOLDER = GOLDENS / "kontext"


@pytest.fixture(scope="module")
def parts():
    return generate.open_model(FOLDER)


@pytest.fixture(scope="module")
def encoded(parts, meta):
    prompts = [meta["prompt"], meta["negative_prompt"], ""]
    ids = {n: kontext.tokenize(FOLDER, n, prompts) for n in kontext.LENGTHS}
    return ids, kontext.encode(parts, lambda n: parts.load(n, jnp.float32), ids, jnp.float32)


@pytest.mark.parametrize(("row", "name"), [(0, "prompt"), (1, "negative"), (2, "empty")])
def test_ids_context_and_pooled_equal_golden(row, name, encoded, golden):
    ids, conditions = encoded
    for i, encoder in enumerate(kontext.LENGTHS, 1):
        assert np.array_equal(ids[encoder][row], golden[f"text/{name}/ids_{i}"][0])
    assert relative(conditions["context"][row], golden[f"text/{name}/embeds"][0]) < 1e-5
    assert relative(conditions["pooled"][row], golden[f"text/{name}/pooled"][0]) < 1e-5


def test_without_t5_its_tokens_are_77_zeros(parts, encoded):
    ids, conditions = encoded
    less = {n: p for n, p in parts.items() if n != kontext.T5}
    short = kontext.encode(less, lambda n: parts.load(n, jnp.float32), ids, jnp.float32)
    assert short["context"].shape[1] == 154
    assert np.array_equal(short["context"][:, :77], conditions["context"][:, :77])
    assert not short["context"][:, 77:].any()
    assert np.array_equal(short["pooled"], conditions["pooled"])


def test_a_tokenizer_that_is_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match="tokenizer_2 is missing"):
        kontext.tokenize(tmp_path, "text_encoder_2", ["a"])
    (tmp_path / "tokenizer_3").mkdir()
    (tmp_path / "tokenizer_3" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be opened as a tokenizer") as e:
        kontext.tokenize(tmp_path, "text_encoder_3", ["a"])
    assert "\n" not in str(e.value)
