"""Releases to the JAX layout and back, bit for bit; what does not fit is refused, by name."""

import filecmp
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import GOLDENS
from flax import traverse_util
from safetensors.numpy import load_file
from safetensors.torch import save_file

from unipic_jax.convert import convert, load, names, store
from unipic_jax.core import files, mesh, params
from unipic_jax.core.errors import InputError
from unipic_jax.model import CLASSES, read_part


def same_tree(a, b):
    """Every file of folder a in folder b, byte for byte, and no other."""
    inside = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file())
              for d in (a, b)]
    assert inside[0] == inside[1]
    match, *off = filecmp.cmpfiles(a, b, inside[0], shallow=False)
    assert len(match) == len(inside[0]), off


@pytest.mark.parametrize("release", ["kontext", "metaquery"])
def test_round_trip_is_byte_for_byte(release, tmp_path):
    convert.convert(GOLDENS / release, tmp_path / "jax", progress=False)
    assert not list((tmp_path / "jax").rglob("*.safetensors"))
    convert.export(tmp_path / "jax", tmp_path / "back", progress=False)
    same_tree(GOLDENS / release, tmp_path / "back")


@pytest.fixture
def clip(tmp_path):
    """A part of its own to change: the golden checkpoint's first text encoder."""
    shutil.copytree(GOLDENS / "kontext" / "text_encoder", tmp_path / "clip")
    return tmp_path / "clip"


def rewrite(part, change, metadata={"format": "pt"}):
    """Change the tensors of a part's one file."""
    file = part / "model.safetensors"
    state = {k: torch.tensor(v) for k, v in load_file(file).items()}
    change(state)
    save_file(state, file, metadata)


def round_trip(part, tmp_path):
    convert.convert(part, tmp_path / "jax", progress=False)
    convert.export(tmp_path / "jax", tmp_path / "back", progress=False)
    return tmp_path / "back"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_type_and_any_bits(dtype, clip, tmp_path):
    """Infinities, NaN payloads, negative zeros and denormals survive."""
    def change(state):
        for k, v in state.items():
            bits = torch.randint(-2**15, 2**15, (v.numel() * dtype.itemsize // 2,),
                                 dtype=torch.int16)
            state[k] = bits.view(dtype).reshape(v.shape)
    rewrite(clip, change)
    same_tree(clip, round_trip(clip, tmp_path))


def test_mixed_types_in_a_stack(clip, tmp_path):
    def change(state):
        for k, v in state.items():
            kind = [torch.float32, torch.bfloat16, torch.float16]["layers.1" in k or 2 * ("2" in k)]
            state[k] = v.to(kind)
    rewrite(clip, change)
    same_tree(clip, round_trip(clip, tmp_path))


def shard(part, suffix=""):
    """The part's file as two shards with an index, as transformers saves them."""
    state = {k: torch.tensor(v) for k, v in load_file(part / "model.safetensors").items()}
    (part / "model.safetensors").unlink()
    keys, where = sorted(state), {}
    for i, half in enumerate((keys[::2], keys[1::2]), 1):
        name = f"model{suffix}-0000{i}-of-00002.safetensors"
        save_file({k: state[k] for k in half}, part / name, {"format": "pt"})
        where |= dict.fromkeys(half, name)
    size = sum(v.nbytes for v in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (part / f"model.safetensors.index{suffix}.json").write_text(json.dumps(index, indent=2))


@pytest.mark.parametrize("suffix", ["", ".fp16"])
def test_shards_with_an_index(suffix, clip, tmp_path):
    shard(clip, suffix)
    same_tree(clip, round_trip(clip, tmp_path))


def test_a_large_stack_lies_in_pieces(clip, tmp_path, monkeypatch):
    """Of two layers and of one; restored whole onto a mesh, and exported."""
    monkeypatch.setattr(store, "GROUP", 10_000)
    convert.convert(clip, tmp_path / "jax", progress=False)
    part = read_part(tmp_path / "jax")
    stored = store._stored(part.folder / convert.PARAMS)
    assert stored["layers", "q", "kernel"][0] == (3, 24, 24)
    assert [stored["layers", "up", "kernel", f"part_{i}"][0][0] for i in (0, 2)] == [2, 1]
    assert store.described(part.folder / convert.PARAMS)["layers", "up", "kernel"][0] == (3, 24, 48)
    m = mesh.make(1, 4, 2)
    tree = load.read(part, mesh=m)
    assert jax.tree.map(lambda a: a.sharding, tree) == params.shardings(part.specs, m)
    jax.tree.map(np.testing.assert_array_equal, tree, load.read(read_part(clip)))
    convert.export(tmp_path / "jax", tmp_path / "back", progress=False)
    same_tree(clip, tmp_path / "back")


def test_a_stack_is_put_together_in_its_own_memory():
    """And not as float32 where a processor has no bfloat16."""
    parts = [jax.ShapeDtypeStruct((2, 64, 64), jnp.bfloat16)] * 14
    assert jax.jit(store._together).lower(parts).compile().memory_analysis(
        ).temp_size_in_bytes == 0


def test_export_in_another_type(clip, tmp_path):
    """Every tensor is the cast of the one there was, the index of the new size."""
    shard(clip)
    want = load.read(read_part(clip), jnp.bfloat16)
    convert.convert(clip, tmp_path / "jax", progress=False)
    convert.export(tmp_path / "jax", tmp_path / "back", progress=False, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, want, load.read(read_part(tmp_path / "back")))
    index, there = (json.loads((root / "model.safetensors.index.json").read_text())
                    for root in (tmp_path / "back", clip))
    assert index["metadata"]["total_size"] * 2 == there["metadata"]["total_size"]
    assert index["weight_map"] == there["weight_map"]


def test_a_variant_beside_the_weights_is_left_alone(clip, tmp_path):
    want = load.read(read_part(clip))
    shutil.copy(clip / "model.safetensors", clip / "model.fp16.safetensors")
    rewrite(clip, lambda state: state.update({k: v + 1 for k, v in state.items()}))
    shutil.move(clip / "model.safetensors", clip / "model.fp32.safetensors")
    shutil.move(clip / "model.fp16.safetensors", clip / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, want, load.read(read_part(clip)))


def test_a_tied_copy_is_kept_and_checked(tmp_path):
    part = tmp_path / "t5"
    shutil.copytree(GOLDENS / "kontext" / "text_encoder_3", part)
    rewrite(part, lambda s: s.update({"encoder.embed_tokens.weight": s["shared.weight"].clone()}))
    same_tree(part, round_trip(part, tmp_path))
    rewrite(part, lambda s: s["encoder.embed_tokens.weight"].add_(1))
    with pytest.raises(InputError, match="differs from the tensor it is tied to"):
        convert.convert(part, tmp_path / "jax2", progress=False)


def test_both_generations_of_qwen_names(tmp_path):
    part = tmp_path / "qwen"
    shutil.copytree(GOLDENS / "metaquery" / "qwen2_5_vl", part)
    old = load.read(read_part(part))

    def rename(state):
        for k in list(state):
            new = k.replace("visual.", "model.visual.") if k.startswith("visual.") else (
                k.replace("model.", "model.language_model.", 1))
            state[new] = state.pop(k)
        assert "model.language_model.layers.0.mlp.up_proj.weight" in state
        assert "model.visual.merger.ln_q.weight" in state
    rewrite(part, rename)
    jax.tree.map(np.testing.assert_array_equal, old, load.read(read_part(part)))
    same_tree(part, round_trip(part, tmp_path))


def test_old_bin_files(clip, tmp_path):
    state = {k: torch.tensor(v) for k, v in load_file(clip / "model.safetensors").items()}
    state["text_projection.weight"] = state["text_projection.weight"].to(torch.bfloat16)
    (clip / "model.safetensors").unlink()
    torch.save(state, clip / "pytorch_model.bin")
    back = load_file(round_trip(clip, tmp_path) / "model.safetensors")
    assert back.keys() == state.keys()
    for k, v in state.items():
        np.testing.assert_array_equal(back[k].astype(np.float32), v.float().numpy())

    torch.save({"a": json.loads}, clip / "pytorch_model.bin")
    with pytest.raises(InputError, match="does not load with weights_only"):
        convert.convert(clip, tmp_path / "jax2", progress=False)


def test_misfits_are_listed(clip, tmp_path):
    def change(state):
        del state["text_projection.weight"]
        state["extra"] = torch.zeros(3)
        state["text_model.final_layer_norm.bias"] = torch.zeros(7)
    rewrite(clip, change)
    with pytest.raises(InputError) as e:
        convert.convert(clip, tmp_path / "jax", progress=False)
    for part in ("missing: text_projection.weight", "not known: extra",
                 "text_model.final_layer_norm.bias is [7], the config says [24]"):
        assert part in str(e.value)
    assert not (tmp_path / "jax").exists()


def test_indices_that_do_not_fit(clip, tmp_path):
    shard(clip)
    index = clip / "model.safetensors.index.json"
    sound = index.read_text()
    for old, new, message in (
            ("text_projection.weight", "other", "puts elsewhere"),
            ("model-00001-of-00002", "../model-00001-of-00002", "outside its folder"),
            ("model-00001-of-00002", "model-00003-of-00002", "cannot be read"),
            ('"weight_map"', '"map"', "no weight_map")):
        index.write_text(sound.replace(old, new))
        with pytest.raises(InputError, match=message):
            convert.convert(clip, tmp_path / "jax", progress=False)
    more = json.loads(sound)
    more["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(more))
    with pytest.raises(InputError, match="'ghost', which no file holds"):
        convert.convert(clip, tmp_path / "jax", progress=False)
    index.unlink()
    with pytest.raises(InputError, match="has several weights; keep the ones"):
        convert.convert(clip, tmp_path / "jax", progress=False)


def test_folders_that_do_not_fit(clip, tmp_path):
    def refused(message, source=clip, target=tmp_path / "jax", do=convert.convert):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=message):
            do(source, target, progress=False)
        assert sorted(tmp_path.rglob("*")) == before  # nothing half-written

    (tmp_path / "file").touch()
    refused("not a folder", tmp_path / "no")
    refused("no part of a model", GOLDENS / "kontext" / "tokenizer")
    refused("exists already", target=GOLDENS)
    refused("lies inside", target=clip / "jax")
    refused("no part in the JAX layout", do=convert.export)
    refused("cannot be written", target=tmp_path / "file" / "jax")
    (clip / "config.json").write_text('{"architectures": ["GPT"]}')
    refused("names the class 'GPT'")
    (clip / "model.safetensors").unlink()
    shutil.copy(GOLDENS / "kontext" / "text_encoder" / "config.json", clip)
    refused("has no weights")


def test_a_failure_midway_leaves_nothing(clip, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(store, "save", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        convert.convert(clip, tmp_path / "jax", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip"]


def test_a_damaged_checkpoint_is_one_line(clip, tmp_path):
    convert.convert(clip, tmp_path / "jax", progress=False)
    config = json.loads((tmp_path / "jax" / "config.json").read_text())
    (tmp_path / "jax" / "config.json").write_text(json.dumps(config | {"projection_dim": 17}))
    with pytest.raises(InputError, match="leaf projection/kernel should be"):
        load.read(read_part(tmp_path / "jax"))
    shutil.rmtree(tmp_path / "jax" / "params" / "state")
    with pytest.raises(InputError) as e:
        load.read(read_part(tmp_path / "jax"))
    assert "\n" not in str(e.value)


def test_restored_onto_a_mesh_from_either_layout(clip, tmp_path):
    convert.convert(clip, tmp_path / "jax", progress=False)
    m = mesh.make(1, 4, 2)
    part = read_part(clip)
    want = params.shardings(part.specs, m)
    for folder in (clip, tmp_path / "jax"):
        tree = load.read(read_part(folder), jnp.bfloat16, m)
        assert jax.tree.map(lambda a: a.sharding, tree) == want
        assert {a.dtype for a in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
        plain = load.read(part)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
                     tree, plain)


def test_a_model_that_was_never_released_exports_to_default_files(tmp_path, monkeypatch):
    """Fresh parameters, to one file or to shards that transformers' own reader takes."""
    part = tmp_path / "jax"
    part.mkdir()
    shutil.copy(GOLDENS / "kontext" / "text_encoder" / "config.json", part)
    read = read_part(part)
    tree = params.init(read.specs, jax.random.key(0))
    flat = traverse_util.flatten_dict(tree)
    store.save(part / convert.PARAMS, (store.Piece(k, np.asarray(v)) for k, v in flat.items()))
    convert.export(part, tmp_path / "one", progress=False)
    jax.tree.map(np.testing.assert_array_equal, tree, load.read(read_part(tmp_path / "one")))

    monkeypatch.setattr(convert, "SHARD_BYTES", {"model": 40_000})
    convert.export(part, tmp_path / "many", progress=False)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    from transformers import CLIPTextModelWithProjection
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path / "many")
    np.testing.assert_array_equal(theirs.text_projection.weight.detach().numpy().T,
                                  tree["projection"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, tree, load.read(read_part(tmp_path / "many")))


def test_every_model_has_a_table_that_fits_its_specs():
    """Forms are inverse to each other, no name or leaf appears twice."""
    for name, (fore, back) in names.FORMS.items():
        rank = {"dense": 2, "conv": 4, "conv3d": 5}.get(name, 3)
        a = np.arange(2 * 3 * 4 * 5 * 6)[:int(np.prod(range(2, 2 + rank)))].reshape(
            range(2, 2 + rank))
        a = a[:1] if name == "batched" else a
        assert np.array_equal(back(fore(a)), a), name
    for folder in [*(GOLDENS / "kontext").iterdir(), *(GOLDENS / "metaquery").iterdir()]:
        if (folder / "config.json").is_file():
            part = read_part(folder)
            rules = names.rules(part.module, part.config)
            all_names = [n for r in rules for n in r.names]
            assert len(set(all_names)) == len(all_names)
            assert len({r.path for r in rules}) == len(rules)
    assert set(names.TABLES) == set(CLASSES.values()) - {CLASSES["FlowMatchEulerDiscreteScheduler"]}


def test_hub_names(monkeypatch, tmp_path):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name: str(tmp_path) if name == "owner/name" else 1 / 0)
    assert load.find("hf://owner/name") == tmp_path
    for bad, message in (("hf://owner/other", "cannot be fetched: division"),
                         ("hf://owner", "write hf://owner/name"), ("no/folder", "is not a folder")):
        with pytest.raises(InputError, match=message):
            load.find(bad)


def test_new_folder_replaces_an_empty_one(tmp_path):
    (tmp_path / "a").mkdir()
    with files.new_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("1")
        assert not list((tmp_path / "a").iterdir())
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "x"]
