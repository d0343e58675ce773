"""Qwen2.5-VL against the goldens and, live, against transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, relative
from jax import lax

from unipic_jax.convert import load
from unipic_jax.core import mesh as meshes
from unipic_jax.core import params as params_lib
from unipic_jax.core.attention import attention
from unipic_jax.model import read_part
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language, rope, vision

see = jax.jit(vision.apply, static_argnames=("cfg", "dtype"))
embed = jax.jit(qwen.embed, static_argnames=("cfg", "dtype"))
read = jax.jit(language.apply, static_argnames=("cfg", "remat"))
logits = jax.jit(language.logits, static_argnames="cfg")


@pytest.fixture(scope="module")
def golden_model():
    part = read_part(GOLDENS / "metaquery" / "qwen2_5_vl")
    return part.config, load.read(part, jnp.float32)


def split(patches, grid, counts):
    """Flat patches and grid as rows that have so many pictures each."""
    grids = np.split(grid, np.cumsum(counts)[:-1])
    ends = np.cumsum([g.prod(1).sum() for g in grids])[:-1]
    return list(zip(np.split(patches, ends), grids))


# The goldens.


def queries_after(golden, key, model):
    """The states at 16 queries after the prompts of a metaquery golden."""
    cfg, params = model
    ids, mask = golden[f"{key}/input_ids"], golden[f"{key}/attention_mask"]
    pictures = None
    if f"{key}/grid_thw" in golden:
        pictures = vision.pack(cfg.vision, split(
            golden[f"{key}/pixel_values"], golden[f"{key}/grid_thw"], (1, 1)), windows=2)
    part = read_part(GOLDENS / "metaquery" / "conditioner")
    queries = load.read(part, jnp.float32)["queries"]
    x = embed(cfg, params, ids, pictures)
    x = jnp.concatenate([x, jnp.broadcast_to(queries, (2, *queries.shape))], 1)
    mask = np.pad(mask, ((0, 0), (0, len(queries))), constant_values=1)
    states, _ = read(cfg, params, x, rope.text_positions(jnp.asarray(mask)), mask)
    return states[:, -len(queries):]


@pytest.mark.parametrize("key", ["metaquery_t2i", "metaquery_edit"])
def test_states_at_the_queries_equal_golden(golden, golden_model, key):
    assert relative(queries_after(golden, key, golden_model), golden[f"{key}/query_hidden"]) < 1e-5


def test_vision_equals_golden(golden, golden_model):
    cfg, params = golden_model
    pictures = vision.pack(cfg.vision, split(
        golden["metaquery_edit/pixel_values"], golden["metaquery_edit/grid_thw"], (1, 1)),
        windows=2)
    seen = see(cfg.vision, params["vision"], pictures)
    want = golden["metaquery_edit/vision_embeds"].reshape(2, 12, -1)
    assert relative(seen[:, :12], want) < 1e-5


@functools.partial(jax.jit, static_argnames=("cfg", "steps"))
def greedy(cfg, params, x, positions, delta, steps):
    """The likeliest tokens after embeddings x [B, S, D], one by one, and their logits."""
    B, S, _ = x.shape
    real = jnp.ones((B, S + steps), bool)
    states, cache = language.apply(cfg, params, x, positions, real,
                                   language.new_cache(cfg, x, S + steps))
    out = language.logits(cfg, params, states[:, -1])

    def step(carry, n):
        out, cache = carry
        token = jnp.argmax(out, -1)
        x = qwen.embed(cfg, params, token[:, None])
        states, cache = language.apply(
            cfg, params, x, jnp.broadcast_to(S + n + delta[:, None], (3, B, 1)), real, cache)
        return (language.logits(cfg, params, states[:, 0]), cache), (token, out)

    _, (tokens, outs) = lax.scan(step, (out, cache), jnp.arange(steps))
    return tokens.T, outs.swapaxes(0, 1)


@pytest.mark.parametrize("size", ["small", "large"])
def test_description_equals_golden(golden, golden_model, size):
    cfg, params = golden_model
    g = {k: golden[f"understand/{size}/{k}"] for k in
         ("input_ids", "grid_thw", "pixel_values", "position_ids", "generated", "logits")}
    positions, delta = rope.picture_positions(cfg, g["input_ids"], [g["grid_thw"]])
    np.testing.assert_array_equal(positions, g["position_ids"])
    pictures = vision.pack(cfg.vision, [(g["pixel_values"], g["grid_thw"])], windows=2)
    x = embed(cfg, params, g["input_ids"], pictures)
    tokens, out = greedy(cfg, params, x, positions, delta, g["generated"].shape[1])
    np.testing.assert_array_equal(tokens, g["generated"])
    assert relative(out, g["logits"]) < 1e-5


# transformers, live.

PLAIN, PICTURE = 90, 95  # ordinary tokens are below 90
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=100, rms_norm_eps=1e-6, rope_theta=1e6,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=False)
VISION = dict(
    depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
    fullatt_block_indexes=[1, 3], window_size=112)
TOKENS = dict(image_token_id=PICTURE, video_token_id=96, vision_start_token_id=93,
              vision_end_token_id=94)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """transformers' model with random weights, and ours from a checkpoint of them."""
    import safetensors.torch
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=VISION, **TOKENS)).eval().float()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.2)
            else:  # large enough for positions and masks to show
                p.normal_(0, 1.0 if "embed_tokens" in name else 1.5 * p[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp("qwen")
    released = {k.replace("model.visual.", "visual.").replace("model.language_model.", "model."):
                v.contiguous() for k, v in theirs.state_dict().items()}
    safetensors.torch.save_file(released, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(
        TEXT | TOKENS | {"vision_config": VISION, "hidden_act": "silu", "model_type": "qwen2_5_vl",
                         "architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
    part = read_part(folder)
    return theirs, part.config, load.read(part, jnp.float32)


# Patches a side: smaller than a window, not divided by windows, several windows, one token.
GRIDS = [[(1, 10, 14), (1, 4, 6)], [(1, 6, 22)], [(1, 16, 8), (1, 2, 2), (1, 8, 8)]]


def prompts(padding: str):
    """(ids, mask, rows of patches and grids): prompts with the pictures of GRIDS, and a fourth
    that is short and has none."""
    rng = np.random.default_rng(1)
    rows = [(rng.normal(size=(sum(h * w for _, h, w in g), 3 * 2 * 14 * 14)).astype(np.float32),
             np.array(g)) for g in GRIDS]
    texts = []
    for (_, grid), extra in zip(rows, (5, 30, 1)):
        text = [*rng.integers(0, PLAIN, 3)]
        for _, h, w in grid:
            text += [93, *[PICTURE] * (h * w // 4), 94, *rng.integers(0, PLAIN, 2)]
        texts.append([*text, *rng.integers(0, PLAIN, extra)])
    texts.append([*rng.integers(0, PLAIN, 4)])
    S = max(map(len, texts))
    ids, mask = np.zeros((2, len(texts), S), np.int64)
    for i, text in enumerate(texts):
        place = slice(S - len(text), S) if padding == "left" else slice(len(text))
        ids[i, place], mask[i, place] = text, 1
    none = (np.zeros((0, rows[0][0].shape[1]), np.float32), np.zeros((0, 3), int))
    return ids, mask, [*rows, none]


WINDOWS = 6


@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_with_pictures_equal_transformers(live, padding):
    import torch
    theirs, cfg, params = live
    ids, mask, rows = prompts(padding)
    as_torch = torch.from_numpy
    grid = as_torch(np.concatenate([g for _, g in rows]))
    kinds = as_torch(np.where(ids == PICTURE, 1, 0))
    with torch.no_grad():
        want = theirs(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), image_grid_thw=grid,
            pixel_values=as_torch(np.concatenate([p for p, _ in rows])), mm_token_type_ids=kinds,
            output_hidden_states=True)
        want_positions, want_delta = theirs.model.get_rope_index(
            as_torch(ids), kinds, grid, attention_mask=as_torch(mask))

    positions, delta = rope.picture_positions(cfg, ids, [g for _, g in rows], mask)
    real = mask.astype(bool)
    np.testing.assert_array_equal(positions[:, real], want_positions.numpy()[:, real])
    assert (positions[:, ~real] == 1).all()
    np.testing.assert_array_equal(delta, want_delta.numpy()[:, 0])

    x = embed(cfg, params, ids, vision.pack(cfg.vision, rows, WINDOWS))
    assert relative(x, want.hidden_states[0].numpy()) < 2e-5
    states, _ = read(cfg, params, x, positions, mask)
    out = np.asarray(logits(cfg, params, states))
    assert np.isfinite(out).all()
    assert relative(np.asarray(states)[real], want.hidden_states[-1].numpy()[real]) < 2e-5
    assert relative(out[real], want.logits.numpy()[real]) < 2e-5


def test_vision_equals_transformers_for_any_size_in_one_program(live):
    """Pictures of every size under one compiled program; padding changes nothing."""
    import torch
    theirs, cfg, params = live
    rng = np.random.default_rng(2)
    traces = []

    @jax.jit
    def run(pictures):
        traces.append(pictures)
        return vision.apply(cfg.vision, params["vision"], pictures)

    for grid in [*GRIDS, [(1, 8, 8)], [(1, 22, 18)]]:
        grid = np.array(grid)
        patches = rng.normal(size=(grid.prod(1).sum(), 1176)).astype(np.float32)
        with torch.no_grad():
            want = theirs.model.visual(torch.from_numpy(patches), torch.from_numpy(grid))
        want = want.pooler_output.numpy()
        seen = run(vision.pack(cfg.vision, [(patches, grid)], 9))
        assert relative(seen[0, :len(want)], want) < 2e-5
    assert len(traces) == 1
    # the last of them filled all nine windows; once more with others after it
    wide = run(vision.pack(cfg.vision, [(patches, grid)], 12))
    assert relative(wide[:, :len(want)], seen[:, :len(want)]) < 1e-6


def test_padding_patches_are_not_read(live):
    _, cfg, params = live
    _, _, rows = prompts("left")
    clean = vision.pack(cfg.vision, rows, WINDOWS)
    padding = clean.segments == 0
    assert padding.any()
    dirty = clean._replace(patches=np.where(padding[..., None], 100.0, clean.patches),
                           places=np.where(padding[..., None], 7, clean.places))
    a, b = (see(cfg.vision, params["vision"], p) for p in (clean, dirty))
    for row, (_, grid) in enumerate(rows[:-1]):
        n = grid.prod(1).sum() // 4
        np.testing.assert_array_equal(a[row, :n], b[row, :n])
    assert np.isfinite(a).all()


def test_gradient_of_the_embeddings_equals_transformers(live):
    import torch
    theirs, cfg, params = live
    ids, mask, _ = prompts("left")
    mask[:, :40] = 0  # shorter
    ids, mask = ids[:, 30:80], mask[:, 30:80]
    rng = np.random.default_rng(3)
    x = rng.normal(size=(*ids.shape, cfg.hidden_size)).astype(np.float32)
    positions = rng.integers(0, 40, (3, *ids.shape))
    targets = rng.integers(0, cfg.vocab_size, ids.shape)

    theirs_x = torch.from_numpy(x).requires_grad_()
    states = theirs.model.language_model(
        inputs_embeds=theirs_x, position_ids=torch.from_numpy(positions),
        attention_mask=torch.from_numpy(mask)).last_hidden_state
    log_p = torch.log_softmax(theirs.lm_head(states), -1)
    picked = torch.gather(log_p, -1, torch.from_numpy(targets)[..., None])[..., 0]
    want_loss = -(picked * torch.from_numpy(mask)).sum() / mask.sum()
    want_loss.backward()

    @functools.partial(jax.jit, static_argnames="remat")
    def loss_and_gradient(x, remat):
        def loss(x):
            states, _ = language.apply(cfg, params, x, jnp.asarray(positions), jnp.asarray(mask),
                                       remat=remat)
            log_p = jax.nn.log_softmax(language.logits(cfg, params, states))
            picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
            return -(picked * mask).sum() / mask.sum()
        return jax.value_and_grad(loss)(x)

    for remat in ("none", "attention"):
        loss, gradient = loss_and_gradient(x, remat)
        assert relative(loss, want_loss.item()) < 1e-6
        assert relative(gradient, theirs_x.grad.numpy()) < 1e-5


# Our own promises.


def test_decoding_with_a_cache_equals_the_whole(live):
    """64 tokens of two prompts, of 3 and 8 tokens padded on the right, one by one and at once."""
    _, cfg, params = live
    B, S, N = 2, 8, 64
    x = jax.random.normal(jax.random.key(0), (B, S + N, cfg.hidden_size))
    mask = np.ones((B, S + N), bool)
    mask[0, 3:S] = False
    positions = rope.text_positions(jnp.asarray(mask))

    @jax.jit
    def decode(x):
        states, cache = language.apply(cfg, params, x[:, :S], positions[..., :S], mask,
                                       language.new_cache(cfg, x, S + N))
        out = jnp.zeros_like(x).at[:, :S].set(states)

        def step(carry):
            out, cache = carry
            at = cache["index"]
            one, place = (lax.dynamic_slice_in_dim(a, at, 1, axis)
                          for a, axis in ((x, 1), (positions, 2)))
            states, cache = language.apply(cfg, params, one, place, mask, cache)
            return lax.dynamic_update_slice_in_dim(out, states, at, 1), cache

        return lax.while_loop(lambda c: c[1]["index"] < S + N, step, (out, cache))[0]

    whole, _ = read(cfg, params, x, positions, mask)
    assert relative(np.asarray(decode(x))[mask], np.asarray(whole)[mask]) < 1e-5


def test_a_mask_of_another_length_is_refused(live):
    _, cfg, params = live
    x = jnp.zeros((1, 4, cfg.hidden_size))
    with pytest.raises(ValueError, match="mask"):
        language.apply(cfg, params, x, jnp.zeros((3, 1, 4)), jnp.ones((1, 4)),
                       language.new_cache(cfg, x, 8))


def test_a_tied_head_is_the_embedding():
    raw = TEXT | TOKENS | {"vision_config": VISION, "tie_word_embeddings": True}
    cfg = qwen.Config.from_json(raw, "config.json")
    specs = qwen.specs(cfg)
    assert "head" not in specs
    token = jax.random.normal(jax.random.key(0), specs["token"].shape)
    states = jax.random.normal(jax.random.key(1), (2, cfg.hidden_size))
    assert relative(language.logits(cfg, {"token": token}, states), states @ token.T) < 1e-6


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 4, 2)])
def test_on_a_mesh_equals_one_device(live, data, fsdp, tensor):
    """Pictures, states, logits, gradient and a decoded token, sharded and not."""
    _, cfg, params = live
    ids, mask, rows = prompts("left")
    positions, delta = rope.picture_positions(cfg, ids, [g for _, g in rows], mask)
    longer = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    batch = dict(ids=ids, mask=mask, positions=positions, longer=longer,
                 next=np.stack([mask.sum(1) + delta] * 3)[..., None],
                 pictures=vision.pack(cfg.vision, rows, WINDOWS))

    def all_of_it(params, batch):
        x = qwen.embed(cfg, params, batch["ids"], batch["pictures"])

        def loss(x):
            states, _ = language.apply(cfg, params, x, batch["positions"], batch["mask"],
                                       remat="attention")
            return jnp.sum(states * states * jnp.cos(x)), states

        gradient, states = jax.grad(loss, has_aux=True)(x)
        cache = language.new_cache(cfg, x, ids.shape[1] + 1)
        _, cache = language.apply(cfg, params, x, batch["positions"], batch["longer"], cache)
        decoded, cache = language.apply(cfg, params, x[:, :1], batch["next"], batch["longer"],
                                        cache)
        out = language.logits(cfg, params, states)
        return x, states, out, gradient, decoded, cache["k"]

    want = jax.jit(all_of_it)(params, batch)
    mesh = meshes.make(data, fsdp, tensor)
    with jax.set_mesh(mesh):
        def lay(path, a):
            at = 1 if path[0].key in ("positions", "next") else 0
            spec = jax.P(*[None] * at, meshes.BATCH, *[None] * (a.ndim - at - 1))
            return jax.device_put(a, jax.NamedSharding(mesh, spec))

        sharded = jax.device_put(params, params_lib.shardings(qwen.specs(cfg), mesh))
        got = jax.jit(all_of_it)(sharded, jax.tree.map_with_path(lay, batch))
        assert got[1].sharding.spec[0] == meshes.BATCH
        assert got[-1].sharding.spec == jax.P(None, meshes.BATCH, None, "tensor", None)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-5


def test_one_prompt_on_a_mesh_traces(live):
    """A batch that the mesh does not divide is on every device; the heads are still split."""
    _, cfg, _ = live
    _, _, rows = prompts("left")
    pictures = vision.pack(cfg.vision, rows[:1])
    mesh = meshes.make(1, 4, 2)
    with jax.set_mesh(mesh):
        params = params_lib.abstract(qwen.specs(cfg), mesh=mesh)

        def run(params, ids, pictures):
            x = qwen.embed(cfg, params, ids, pictures)
            return language.apply(cfg, params, x, rope.text_positions(ids > 0), ids > 0,
                                  language.new_cache(cfg, x, ids.shape[1]))

        states, cache = jax.eval_shape(run, params, jnp.ones((1, 9), jnp.int32), pictures)
    assert states.shape == (1, 9, cfg.hidden_size)
    assert cache["k"].sharding.spec == jax.P(None, None, None, "tensor", None)


def test_half_precision_is_near(live):
    _, cfg, params = live
    ids, mask, rows = prompts("right")
    positions, _ = rope.picture_positions(cfg, ids, [g for _, g in rows], mask)
    pictures = vision.pack(cfg.vision, rows, WINDOWS)
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        x = embed(cfg, params, ids, pictures, dtype)
        states, _ = read(cfg, params, x, positions, mask)
        assert x.dtype == states.dtype == dtype
        found.append((np.asarray(x, np.float32), np.asarray(states, np.float32)[mask.astype(bool)]))
    for whole, half in zip(*found):
        assert 1e-4 < relative(half, whole) < 0.1


def test_image_tokens_must_be_those_of_the_pictures(live):
    _, cfg, _ = live
    one = np.array([[1, PICTURE, PICTURE, 2]])
    for grid in ([(1, 2, 2)], [(1, 2, 6)], [(1, 2, 4), (1, 2, 2)], [(2, 2, 2)]):
        with pytest.raises(ValueError, match="row 0"):
            rope.picture_positions(cfg, one, [grid])
    positions, delta = rope.picture_positions(cfg, one, [[(1, 2, 4)]])
    np.testing.assert_array_equal(positions[:, 0], [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]])
    assert delta.tolist() == [0]


def test_pictures_that_do_not_fit_are_refused(live):
    _, cfg, _ = live
    for patches, grid, windows in ((280, (1, 14, 20), 5), (100, (1, 8, 8), 1), (9, (1, 3, 3), 1),
                                   (8, (2, 2, 2), 1)):
        with pytest.raises(ValueError, match=r"windows|patches|grid"):
            vision.pack(cfg.vision, [(np.zeros((patches, 1176)), np.array([grid]))], windows)


def test_text_positions_skip_padding():
    positions = rope.text_positions(jnp.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]]))
    assert positions.shape == (3, 2, 5)
    for axis in positions:
        np.testing.assert_array_equal(axis, [[1, 1, 0, 1, 2], [0, 1, 1, 1, 2]])


def test_attention_takes_a_mask():
    """Against a loop over queries; grouped heads, a mask by head, and one that admits nothing."""
    rng = np.random.default_rng(0)
    B, T, S, H, G, K = 2, 5, 7, 4, 2, 8
    q, k, v = (rng.normal(size=(B, n, h, K)).astype(np.float32)
               for n, h in ((T, H), (S, G), (S, G)))
    attend = jax.jit(attention, static_argnames=("causal", "implementation"))
    for shape in ((B, H, T, S), (B, 1, 1, S), (T, S)):
        mask = rng.random(shape) < 0.5
        mask[..., 0] = True
        out = np.array(attend(q, k, v, mask=mask))
        whole = np.broadcast_to(mask, (B, H, T, S))
        for b, h, t in np.ndindex(B, H, T):
            at = np.flatnonzero(whole[b, h, t])
            mine, values = (a[b, at, h // (H // G)] for a in (k, v))
            scores = np.exp(mine @ q[b, t, h] / K**0.5)
            assert np.abs(out[b, t, h] - scores / scores.sum() @ values).max() < 1e-6
    past = np.tril(np.ones((T, S), bool), S - T)
    np.testing.assert_array_equal(attend(q, k, v, mask=mask, causal=True),
                                  attend(q, k, v, mask=mask & past))
    nothing = np.zeros((B, 1, T, S), bool)
    out, gradient = jax.jit(jax.value_and_grad(
        lambda q: attention(q, k, v, mask=nothing).sum()))(q)
    assert np.isfinite(out)
    np.testing.assert_array_equal(gradient, 0)
    out = attend(q, k, v, mask=nothing, implementation="blockwise")
    mean = v.mean(1)[:, None].repeat(H // G, 2)
    assert np.abs(out - mean).max() < 1e-6
