"""The Qwen2.5-VL cases of `benchmarks.speed`: the released widths, four of the language model's
layers (without the vocabulary), the whole vision tower.

prefill: 512 tokens through the layers; tokens: 16 more, one by one, with the cache; vision: a
picture of 512x512 (1296 patches).
"""

import numpy as np

from benchmarks.speed import jax_weights, normal, value

PROMPT, NEW = 512, 16
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
              out_hidden_size=3584, fullatt_block_indexes=(7, 15, 23, 31))
TEXT = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=4,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=64)
GRID = np.array([[1, 36, 36]])


def sizes(case: str) -> tuple[dict, dict]:
    """The language model's and the tower's widths; what a case does not use is left out."""
    if case == "vision":
        return TEXT | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64,
                       "num_attention_heads": 2, "num_key_value_heads": 2}, VISION
    return TEXT, VISION | {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}


def jax_side(case: str, kind):
    import jax
    import jax.numpy as jnp

    from unipic_jax.models import qwen2_5_vl as qwen
    from unipic_jax.models.qwen2_5_vl import language, vision

    text, tower = sizes(case)
    head = text["hidden_size"] // text["num_attention_heads"] // 2
    cfg = qwen.Config(**text, mrope_section=(head - 2 * (head * 3 // 8), *[head * 3 // 8] * 2),
                      image_token_id=1, video_token_id=2, vision_start_token_id=3,
                      vision=qwen.VisionConfig(**tower))
    tree = jax_weights(qwen, cfg, kind)
    if case == "vision":
        pictures = vision.pack(cfg.vision, [(normal(0, 1296, 1176), GRID)])
        run = jax.jit(lambda p, x: vision.apply(cfg.vision, p, x, kind))
        tokens = GRID.prod() // 4  # the rest is padding
        return lambda: np.asarray(run(tree["vision"], pictures), np.float32)[0, :tokens]

    length = PROMPT + NEW
    places = jnp.broadcast_to(jnp.arange(length), (3, 1, length))
    x = jnp.asarray(normal(0, 1, PROMPT, 3584), kind)

    @jax.jit
    def prefill(p, x):
        real = jnp.ones((1, length), bool)
        return language.apply(cfg, p, x, places[:, :, :PROMPT], real,
                              language.new_cache(cfg, x, length))

    @jax.jit
    def tokens(p, x, cache):
        def step(carry, n):
            x, cache = carry
            place = jax.lax.dynamic_slice_in_dim(places, n, 1, 2)
            return language.apply(cfg, p, x, place, jnp.ones((1, length), bool), cache), None
        return jax.lax.scan(step, (x, cache), PROMPT + jnp.arange(NEW))[0][0]

    if case == "prefill":
        return lambda: np.asarray(prefill(tree, x)[0], np.float32)
    states, cache = prefill(tree, x)
    return lambda: np.asarray(tokens(tree, states[:, -1:], cache), np.float32)


def torch_side(case: str, kind):
    import torch
    from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from unipic_jax.convert import names
    from unipic_jax.models import qwen2_5_vl as qwen

    text, tower = sizes(case)
    head = text["hidden_size"] // text["num_attention_heads"] // 2
    rope = {"type": "default", "rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [head - 2 * (head * 3 // 8), *[head * 3 // 8] * 2]}
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": rope, "tie_word_embeddings": False},
        vision_config=tower, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    buffers = {n: b for n, b in Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": rope, "num_hidden_layers": 1, "intermediate_size": 8},
        vision_config=tower | {"depth": 1, "intermediate_size": 8})).named_buffers()}
    state = {n: torch.from_numpy(value(names.canonical(qwen, n), tuple(p.shape)).astype(
        np.float32)).to(kind) for n, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for name, b in buffers.items():  # the frequencies of positions, which no file holds
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, b)
    model.eval()

    if case == "vision":
        patches = torch.from_numpy(normal(0, 1296, 1176)).to(kind)
        grid = torch.from_numpy(GRID)

        def run():
            out = model.model.visual(patches, grid)
            out = getattr(out, "pooler_output", out)
            return (out[0] if isinstance(out, list | tuple) else out).float().numpy()
        return run

    x = torch.from_numpy(normal(0, 1, PROMPT, 3584)).to(kind)

    def layers(x, first, cache):
        places = torch.arange(first, first + x.shape[1]).expand(3, 1, -1)
        return model.model.language_model(inputs_embeds=x, position_ids=places,
                                          past_key_values=cache, use_cache=True).last_hidden_state

    def prefill():
        return layers(x, 0, cache := DynamicCache(config=config.text_config)), cache

    if case == "prefill":
        return lambda: prefill()[0].float().numpy()
    states, cache = prefill()

    def tokens():
        last = states[:, -1:]
        for i in range(NEW):
            last = layers(last, PROMPT + i, cache)
        cache.crop(-NEW)  # as it was, for the next turn
        return last.float().numpy()

    return tokens
