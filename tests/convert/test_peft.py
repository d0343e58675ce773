"""Adapters in diffusers' file: the same pictures on both sides, the same bits there and back."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import GOLDENS, first, relative
from diffusers.loaders import SD3LoraLoaderMixin
from flax import traverse_util
from peft import LoraConfig, get_peft_model_state_dict

from benchmarks import reference
from unipic_jax.convert import convert, peft, store
from unipic_jax.core import lora, params
from unipic_jax.core.errors import InputError
from unipic_jax.model import read_part
from unipic_jax.models import mmdit

RANK, ALPHA = 4, 10
TRANSFORMER = GOLDENS / "kontext" / "transformer"
PEFT_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
                "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]


def drawn(part, targets, rank=RANK):
    """Adapters of which neither factor is zero."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), jnp.float32),
                        lora.specs(part.specs, targets, rank), is_leaf=params.is_spec)


@pytest.fixture(scope="module")
def part():
    return read_part(TRANSFORMER)


@pytest.fixture
def twin():
    return reference.load(TRANSFORMER)


@pytest.fixture(scope="module")
def x(part):
    cfg, draw = part.config, np.random.default_rng(1)
    shapes = {"latents": (2, 8, 8, cfg.in_channels), "reference": (2, 8, 8, cfg.in_channels),
              "context": (2, 5, cfg.joint_attention_dim), "pooled": (2, cfg.pooled_projection_dim)}
    return {k: draw.normal(size=s).astype(np.float32) for k, s in shapes.items()} | {
        "timestep": np.array([250.5, 900.0], np.float32)}


def run_twin(twin, x):
    t = {k: torch.tensor(first(v) if v.ndim == 4 else v) for k, v in x.items()}
    with torch.no_grad():
        return twin(t["latents"], ref_hidden_states=t["reference"], timestep=t["timestep"],
                    encoder_hidden_states=t["context"], pooled_projections=t["pooled"],
                    return_dict=False)[0]


def run(kontext, mmdit_apply, adapters, scale, x):
    cfg, weights = kontext["transformer"]
    return first(mmdit_apply(cfg, lora.join(weights, adapters, scale), **x))


def same(a, b):
    a, b = traverse_util.flatten_dict(a), traverse_util.flatten_dict(b)
    return a.keys() == b.keys() and all(
        np.asarray(v).dtype == b[k].dtype and np.asarray(v).tobytes() == b[k].tobytes()
        for k, v in a.items())


# Flow-GRPO's layers; every layer of both stacks and of the last block; some of one stack.
@pytest.mark.parametrize("targets", [mmdit.LORA_TARGETS, ("*",), ("dual/image2/*", "last/text/k")])
def test_diffusers_loads_what_is_exported(targets, part, twin, x, kontext, mmdit_apply, tmp_path):
    adapters = drawn(part, targets)
    peft.export_lora(part, adapters, ALPHA, tmp_path / peft.FILE)
    before = run_twin(twin, x)
    twin.load_lora_adapter(tmp_path, adapter_name="a", use_safetensors=True)
    assert twin.peft_config["a"].lora_alpha == ALPHA
    want = run_twin(twin, x)
    assert relative(want, before) > 1e-3
    assert relative(run(kontext, mmdit_apply, adapters, ALPHA / RANK, x), want) < 1e-5

    back, rank, alpha = peft.read_lora(part, tmp_path / peft.FILE)
    assert (rank, alpha) == (RANK, ALPHA)
    assert same(adapters, back)


def test_a_pipeline_loads_what_is_exported(part, twin, x, kontext, mmdit_apply, tmp_path):
    class Pipeline(SD3LoraLoaderMixin):
        transformer, text_encoder, text_encoder_2, lora_scale = twin, None, None, 1.0

    adapters = drawn(part, mmdit.LORA_TARGETS)
    peft.export_lora(part, adapters, ALPHA, tmp_path / peft.FILE)
    state, metadata = Pipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == ALPHA
    Pipeline.load_lora_into_transformer(state, twin, metadata=metadata)
    want = run_twin(twin, x)
    assert relative(run(kontext, mmdit_apply, adapters, ALPHA / RANK, x), want) < 1e-5


def test_an_adapter_of_peft_is_read(part, twin, x, kontext, mmdit_apply, tmp_path):
    """The same layers by Flow-GRPO's names and by ours, and back to the same tensors."""
    twin.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False,
                                target_modules=PEFT_TARGETS), adapter_name="a")
    layers = get_peft_model_state_dict(twin, adapter_name="a")
    SD3LoraLoaderMixin.save_lora_weights(
        tmp_path, transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=twin.peft_config["a"].to_dict())
    adapters, rank, alpha = peft.read_lora(part, tmp_path / peft.FILE)
    assert (rank, alpha) == (RANK, ALPHA)
    assert adapters.keys() == {"dual", "plain", "last"}
    shapes = jax.tree.map(lambda s: s.shape, lora.specs(part.specs, mmdit.LORA_TARGETS, RANK),
                          is_leaf=params.is_spec)
    assert jax.tree.map(lambda a: a.shape, adapters) == shapes
    out = run(kontext, mmdit_apply, adapters, alpha / rank, x)
    assert relative(out, run_twin(twin, x)) < 1e-5

    peft.export_lora(part, adapters, alpha, tmp_path / "again.safetensors")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / peft.FILE)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[n], theirs[n]) for n in again)


def test_merged_weights_are_exported(part, twin, x, kontext, mmdit_apply, tmp_path):
    adapters = drawn(part, mmdit.LORA_TARGETS)
    merged = lora.merge(kontext["transformer"][1], adapters, ALPHA / RANK)
    ours = tmp_path / "ours"
    ours.mkdir()
    shutil.copy(TRANSFORMER / "config.json", ours)
    store.save(ours / convert.PARAMS, (store.Piece(p, np.asarray(a), None) for p, a in
                                       traverse_util.flatten_dict(merged).items()))
    convert.export(ours, tmp_path / "released", progress=False)
    want = run_twin(reference.load(tmp_path / "released"), x)
    assert relative(run(kontext, mmdit_apply, adapters, ALPHA / RANK, x), want) < 1e-5
    peft.export_lora(part, adapters, ALPHA, tmp_path / peft.FILE)
    twin.load_lora_adapter(tmp_path, use_safetensors=True)
    twin.fuse_lora()
    assert relative(run_twin(twin, x), want) < 1e-5


@pytest.mark.parametrize("folder", [
    "kontext/text_encoder", "kontext/text_encoder_2", "kontext/text_encoder_3",
    "metaquery/qwen2_5_vl", "metaquery/conditioner", "kontext/vae"])
def test_every_part_comes_back_bit_for_bit(folder, tmp_path):
    part = read_part(GOLDENS / folder)
    adapters = jax.tree.map(lambda a: a.astype(jnp.bfloat16), drawn(part, ("*",), rank=2))
    peft.export_lora(part, adapters, 3.5, tmp_path / peft.FILE)
    back, rank, alpha = peft.read_lora(part, tmp_path / peft.FILE)
    assert (rank, alpha) == (2, 3.5)
    assert same(adapters, back)


def test_text_encoder_of_transformers_loads_what_is_exported(kontext, tmp_path):
    from transformers import CLIPTextModelWithProjection

    from unipic_jax.models import clip_text
    part = read_part(GOLDENS / "kontext" / "text_encoder")
    adapters = drawn(part, ("layers/[qkv]", "layers/out"))
    peft.export_lora(part, adapters, ALPHA, tmp_path / peft.FILE)
    twin = CLIPTextModelWithProjection.from_pretrained(part.folder, torch_dtype=torch.float32)
    state, metadata = SD3LoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    SD3LoraLoaderMixin.load_lora_into_text_encoder(state, None, twin, prefix="text_encoder",
                                                   metadata=metadata)
    ids = np.random.default_rng(0).integers(0, 79, (2, 9))
    with torch.no_grad():
        want = twin(torch.tensor(ids), output_hidden_states=True).hidden_states[-2]
    cfg, weights = kontext["text_encoder"]
    base, _ = clip_text.apply(cfg, weights, ids)
    out, _ = clip_text.apply(cfg, lora.join(weights, adapters, ALPHA / RANK), ids)
    assert relative(out, want) < 1e-5 < relative(base, want)


def rewritten(file, change_tensors=lambda t: t, **metadata):
    """The file with other tensors and with PEFT keys changed, or without a config (None)."""
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as f:
        config = json.loads(f.metadata()[peft.METADATA])
    config |= {f"transformer.{k}": v for k, v in metadata.items()}
    safetensors.torch.save_file(change_tensors(tensors), file, {peft.METADATA: json.dumps(config)})


NAME = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(("change", "metadata", "message"), [
    (lambda t: t, {"use_dora": True}, "use_dora = true is not supported"),
    (lambda t: t, {"rank_pattern": {"to_q": 8}}, "rank_pattern"),
    (lambda t: t, {"r": "many"}, "is not a PEFT config"),
    (lambda t: t, {"r": 8}, "the config and rank 8 say"),
    (lambda t: {k: v for k, v in t.items() if k != NAME}, {}, "not of the same layers"),
    (lambda t: t | {NAME.replace("to_q", "to_z"): t[NAME].clone()}, {}, "to_z.*is not known"),
    (lambda t: {k.replace("transformer.", "unet."): v for k, v in t.items()}, {},
     "holds no adapter of the transformer"),
])
def test_an_adapter_that_does_not_fit_is_refused(change, metadata, message, part, tmp_path):
    file = tmp_path / peft.FILE
    peft.export_lora(part, drawn(part, mmdit.LORA_TARGETS), ALPHA, file)
    rewritten(file, change, **metadata)
    with pytest.raises(InputError, match=message):
        peft.read_lora(part, file)


def test_layers_that_a_file_leaves_out_are_zeros(part, tmp_path):
    """And without a config, alpha is the rank."""
    file = tmp_path / peft.FILE
    adapters = drawn(part, mmdit.LORA_TARGETS)
    peft.export_lora(part, adapters, ALPHA, file)
    kind, layer = next((k, part.config.stacked(k)[0]) for k in ("plain", "dual")
                       if len(part.config.stacked(k)) > 1)
    tensors = {k: v for k, v in safetensors.torch.load_file(file).items()
               if f"_blocks.{layer}." in k}
    safetensors.torch.save_file(tensors, file)
    back, rank, alpha = peft.read_lora(part, file)
    assert (rank, alpha) == (RANK, RANK)
    a, b = (tree[kind]["image"]["q"]["lora_b"] for tree in (adapters, back))
    assert (b[0] == a[0]).all()
    assert not b[1:].any()
    assert back.keys() == {kind}


def test_an_adapter_of_another_model_is_not_exported(part, tmp_path):
    other = dataclasses.replace(part, config=dataclasses.replace(
        part.config, dual_attention_layers=()))
    with pytest.raises(ValueError, match="has no layer for dual"):
        peft.export_lora(other, drawn(part, ("dual/*",)), ALPHA, tmp_path / peft.FILE)
    assert not any(tmp_path.iterdir())
