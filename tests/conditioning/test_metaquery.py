"""MetaQuery's prompts and conditions against the goldens, and what must not change them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, relative
from PIL import Image

from unipic_jax.conditioning import metaquery, qwen_chat
from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.core import params as params_lib
from unipic_jax.core.errors import InputError
from unipic_jax.model import read_part
from unipic_jax.models.qwen2_5_vl import vision

FOLDER = GOLDENS / "metaquery" / "qwen2_5_vl"
TASKS = ["metaquery_t2i", "metaquery_edit"]

apply = jax.jit(metaquery.apply, static_argnames=("qwen_cfg", "cfg", "dtype", "remat"))
query_states = jax.jit(metaquery.query_states, static_argnames=("cfg", "dtype", "remat"))


@pytest.fixture(scope="module")
def model():
    """Both configs and both trees of parameters, as `metaquery.apply` takes them."""
    parts = [read_part(f) for f in (FOLDER, GOLDENS / "metaquery" / "conditioner")]
    return (*(p.config for p in parts), *(load.read(p, jnp.float32) for p in parts))


@pytest.fixture(scope="module")
def chat():
    return qwen_chat.open_chat(FOLDER)


def prepare(chat, model, *args, **kw):
    return metaquery.prepare(chat, model[0], model[1].num_queries, *args, **kw)


@pytest.fixture(scope="module")
def inputs(chat, model, golden, meta):
    """The goldens' rows, [prompt, negative], of both tasks."""
    picture = Image.fromarray(golden["edit/resized"])
    return {
        "metaquery_t2i": prepare(chat, model, [meta["prompt"], ""]),
        "metaquery_edit": prepare(chat, model, [meta["edit_prompt"], meta["negative_prompt"]],
                                  [picture] * 2)}


@pytest.mark.parametrize("task", TASKS)
def test_ids_and_positions_equal_golden(task, inputs, golden):
    ids, mask = golden[f"{task}/input_ids"], golden[f"{task}/attention_mask"].astype(bool)
    S, got = ids.shape[1], inputs[task]
    assert S < got.ids.shape[1] == got.mask.shape[1] - 16  # to a multiple of 64
    np.testing.assert_array_equal(got.mask[:, :S], mask)
    assert not got.mask[:, S:-16].any()
    np.testing.assert_array_equal(got.ids[:, :S][mask], ids[mask])
    length = mask.sum(1)[:, None]
    np.testing.assert_array_equal(got.positions[..., -16:] - length, [[np.arange(16)] * 2] * 3)


def test_pixels_and_vision_equal_golden(inputs, golden, model):
    cfg, _, params, _ = model
    pictures = inputs["metaquery_edit"].pictures
    patches = np.split(golden["metaquery_edit/pixel_values"], 2)
    want = vision.pack(cfg.vision, list(zip(patches, golden["metaquery_edit/grid_thw"][:, None])))
    for a, b in zip(pictures, want):
        np.testing.assert_array_equal(a, b)
    seen = jax.jit(vision.apply, static_argnums=0)(cfg.vision, params["vision"], pictures)[:, :12]
    assert relative(seen.reshape(24, -1), golden["metaquery_edit/vision_embeds"]) < 1e-5


@pytest.mark.parametrize("task", TASKS)
def test_states_and_conditions_equal_golden(task, inputs, golden, model):
    cfg, _, params, mine = model
    states = query_states(cfg, params, mine["queries"], inputs[task])
    assert relative(states, golden[f"{task}/query_hidden"]) < 1e-5
    out = apply(*model, inputs[task])
    assert relative(out["context"], golden[f"{task}/embeds"]) < 1e-5
    assert relative(out["pooled"], golden[f"{task}/pooled"]) < 1e-5


def test_a_row_is_the_same_in_any_batch(chat, model, meta, inputs):
    """Alone, or padded to several times its length beside others; by two compiled programs."""
    batch = prepare(chat, model, [meta["prompt"], "a " * 200, ""])
    assert batch.ids.shape[1] > 3 * inputs["metaquery_t2i"].ids.shape[1]
    out, alone = (apply(*model, i)["context"] for i in (batch, inputs["metaquery_t2i"]))
    assert relative(out[0], alone[0]) < 1e-5
    assert relative(out[2], alone[1]) < 1e-5
    assert prepare(chat, model, ["a"]).ids.shape == prepare(chat, model, ["a b"]).ids.shape


def test_padding_is_not_read(inputs, model):
    clean = inputs["metaquery_t2i"]
    padding = ~clean.mask[:, :-16]
    dirty = clean._replace(ids=np.where(padding, 7, clean.ids))
    np.testing.assert_array_equal(apply(*model, dirty)["context"], apply(*model, clean)["context"])


def test_three_axes_and_newline_are_options(chat, model, golden, meta, inputs):
    """With three axes the queries come after the picture's longer side, not after all its tokens;
    the goldens tell the difference."""
    picture = Image.fromarray(golden["edit/resized"])  # 3 x 4 tokens
    plain, three, newline = (prepare(chat, model, [meta["edit_prompt"]], [picture], **style)
                             for style in ({}, {"three_axis_rope": True}, {"newline": True}))
    np.testing.assert_array_equal(plain.positions[:, 0, -1] - three.positions[:, 0, -1], [8] * 3)
    assert newline.mask.sum() == plain.mask.sum() + 1
    text = chat.tokenizer.decode(newline.ids[0])
    assert "<|vision_end|>\nremove the hat" in text
    out = apply(*model, three)
    assert relative(out["context"], golden["metaquery_edit/embeds"][:1]) > 1e-3


def test_on_a_mesh_equals_one_device(chat, model, golden):
    """The conditions; and the gradient for the conditioner can be sharded."""
    cfg, mine, *trees = model
    picture = Image.fromarray(golden["edit/resized"])
    batch = prepare(chat, model, ["a hat", "no hat", "a red hat", ""], [picture] * 4)

    def gradient(qwen_params, params, batch):
        def loss(params):
            out = metaquery.apply(cfg, mine, qwen_params, params, batch, remat="attention")
            return jnp.sum(out["context"]) + jnp.sum(out["pooled"])
        return jax.grad(loss)(params)

    want = apply(*model, batch)
    mesh = meshes.make(1, 4, 2)
    with jax.set_mesh(mesh):
        def lay(path, a):
            spec = [None] * a.ndim
            spec[path[0].name == "positions"] = meshes.BATCH
            return jax.device_put(a, jax.NamedSharding(mesh, jax.P(*spec)))

        modules = (read_part(FOLDER), read_part(GOLDENS / "metaquery" / "conditioner"))
        trees = [jax.device_put(t, params_lib.shardings(p.specs, mesh))
                 for t, p in zip(trees, modules)]
        batch = jax.tree.map_with_path(lay, batch)
        got = apply(cfg, mine, *trees, batch)
        gradients = jax.eval_shape(gradient, *trees, batch)
    for name, a in got.items():
        assert a.sharding.spec[0] == meshes.BATCH
        assert relative(a, want[name]) < 1e-5
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, trees[1])


# The template.


def test_a_conversation_is_rendered_without_a_system_prompt(chat):
    picture = Image.new("RGB", (56, 56))
    text = qwen_chat.render(chat, [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "image": picture},
                                     {"type": "image", "image": picture},
                                     {"type": "text", "text": "{{ 1 + 1 }}?"}]},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "sure?"}])
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{image}{image}{{{{ 1 + 1 }}}}?"
        "<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n")


def test_the_template_may_lie_in_three_files(tmp_path, chat):
    template = (FOLDER / "chat_template.jinja").read_text()
    shutil.copytree(FOLDER, tmp_path / "0", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "0" / "chat_template.jinja").unlink()
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    config = json.loads((tmp_path / "0" / "tokenizer_config.json").read_text())
    (tmp_path / "0" / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": template}))
    (tmp_path / "1" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    for i in range(2):
        assert qwen_chat.open_chat(tmp_path / str(i)).template == chat.template


def refused(folder, change, name):
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    change(folder / name)
    with pytest.raises(InputError) as e:
        qwen_chat.open_chat(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def replaced(old, new):
    return lambda file: file.write_text(file.read_text().replace(old, new))


def test_what_is_not_qwen_is_refused(tmp_path):
    template = "chat_template.jinja"
    cases = [(replaced("helpful", "harmless"), template, "not the chat template"),
             (replaced("{{ message['role'] }}\n", "{{ message['role'] }}: "), template,
              "not the chat template"),
             (replaced("{% endfor %}", "{% endwhile %}"), template, "not the chat template"),
             (lambda file: file.unlink(), template, "no chat template"),
             (lambda file: file.unlink(), "preprocessor_config.json", "is missing"),
             (replaced("{", "["), "tokenizer.json", "cannot be opened as a tokenizer"),
             (lambda file: [(file.parent / n).unlink() for n in ("tokenizer.json", "vocab.json",
                                                                 "merges.txt")],
              "tokenizer.json", "has no tokenizer")]
    for i, (change, name, message) in enumerate(cases):
        assert message in refused(tmp_path / str(i), change, name)


def test_image_tokens_in_a_text_are_refused(chat, model):
    with pytest.raises(InputError, match=r"leave <\|image_pad\|> out"):
        prepare(chat, model, ["draw <|image_pad|>"])


def test_buckets_are_few_and_not_much_larger():
    sizes = {qwen_chat.bucket(n) for n in range(1, 257)}
    assert len(sizes) == 8 + 5 * 4
    assert all(n <= qwen_chat.bucket(n) <= max(n * 1.25, 8) for n in range(1, 1000))
    assert [qwen_chat.bucket(n, 64) for n in (1, 64, 65, 577)] == [64, 64, 128, 640]
