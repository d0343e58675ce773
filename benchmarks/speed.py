"""Speed against PyTorch: the same work, weights, machine, threads and run, turn by turn.

    python -m benchmarks.speed [--cases transformer decode edit prefill tokens vision]
                               [--dtypes float32 bfloat16] [--turns 5] [--json F]

Each side of each case runs in a process of its own that waits while the other works. Times are
medians over the turns, compiled and warmed up; the error is the relative L2 distance of the two
results, so that what is compared is known to be the same computation.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.turns import alternate

ROOT = Path(__file__).parents[1]
MODEL, SOURCE = ROOT / "tests/goldens/kontext", ROOT / "tests/goldens/source.png"
CASES, QWEN = ("transformer", "decode", "edit"), ("prefill", "tokens", "vision")
STEPS, SIZE = 6, 128  # of the tiny edit

TRANSFORMER = dict(  # SD3.5-Medium at a sixth of its depth
    num_layers=4, attention_head_dim=64, num_attention_heads=24, in_channels=16, out_channels=16,
    patch_size=2, joint_attention_dim=4096, caption_projection_dim=1536,
    pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=(0, 1),
    sample_size=128)
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
           norm_num_groups=32, scaling_factor=1.5305, shift_factor=0.0609)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def jax_weights(module, cfg, kind):
    """The values of the PyTorch side, by the table of names."""
    import jax.numpy as jnp
    from flax import traverse_util

    from unipic_jax.convert import names
    from unipic_jax.core import params

    specs = traverse_util.flatten_dict(module.specs(cfg), is_leaf=lambda _, s: params.is_spec(s))
    tree = {}
    for rule in names.rules(module, cfg):
        fore, back = names.FORMS[rule.form]
        shape = specs[rule.path].shape[1:] if rule.stacked else specs[rule.path].shape
        shape = back(np.broadcast_to(np.uint8(0), shape)).shape
        arrays = [fore(value(n, shape)) for n in rule.names]
        tree[rule.path] = jnp.asarray(np.stack(arrays) if rule.stacked else arrays[0], kind)
    return traverse_util.unflatten_dict(tree)


def jax_side(case: str, dtype: str):
    """A function of no argument that does the case's work and returns its result."""
    import jax
    import jax.numpy as jnp

    from unipic_jax.models import autoencoder, mmdit

    kind = jnp.dtype(dtype)

    if case in QWEN:
        from benchmarks import speed_qwen
        return speed_qwen.jax_side(case, kind)
    if case == "transformer":
        cfg = mmdit.Config(**TRANSFORMER)
        tree, x = jax_weights(mmdit, cfg, kind), transformer_inputs()
        x = {k: jnp.asarray(np.moveaxis(v, 1, -1) if v.ndim == 4 else v, kind)
             for k, v in x.items()}
        f = jax.jit(lambda p, x: mmdit.apply(cfg, p, **x))
        return lambda: np.moveaxis(np.asarray(f(tree, x), np.float32), -1, 1)
    if case == "decode":
        cfg = autoencoder.Config(**VAE)
        tree, z = jax_weights(autoencoder, cfg, kind), jnp.asarray(normal(0, 1, 64, 64, 16), kind)
        f = jax.jit(lambda p, z: autoencoder.decode(cfg, p, z))
        return lambda: np.moveaxis(np.asarray(f(tree, z), np.float32), -1, 1)

    from unipic_jax.core import images
    from unipic_jax.pipelines import edit, generate
    parts = generate.open_model(MODEL, keep=True)
    picture = images.open_picture(SOURCE)
    options = generate.Options(steps=STEPS, dtype=kind, vae_dtype=kind)
    latents = np.moveaxis(normal(0, 1, 16, 12, 16), 1, -1)
    return lambda: edit.edit(parts, [picture], ["make it green"], image_size=SIZE, latents=latents,
                             options=options).pictures


def value(name: str, shape) -> np.ndarray:
    """A weight by its released name, the same on both sides."""
    seed = int.from_bytes(name.encode()[-12:], "little") % 2**32
    if name.endswith(".bias"):
        return 0.02 * normal(seed, *shape)
    if len(shape) == 1:
        return 1 + 0.1 * normal(seed, *shape)
    return normal(seed, *shape) / np.sqrt(np.prod(shape[1:]))


def transformer_inputs() -> dict[str, np.ndarray]:
    return {"latents": normal(0, 1, 16, 64, 64), "reference": normal(1, 1, 16, 64, 64),
            "context": normal(2, 1, 333, 4096), "pooled": normal(3, 1, 2048),
            "timestep": np.array([500.0], np.float32)}


def torch_side(case: str, dtype: str):
    """The same in PyTorch: diffusers' models, transformers' encoders."""
    import os

    import torch
    from diffusers import AutoencoderKL

    from benchmarks import reference

    torch.set_grad_enabled(False)
    torch.set_num_threads(os.cpu_count())
    kind = getattr(torch, dtype)

    if case in QWEN:
        from benchmarks import speed_qwen
        return speed_qwen.torch_side(case, kind)

    def filled(module):
        for name, p in module.state_dict().items():
            p.copy_(torch.from_numpy(value(name, tuple(p.shape)).astype(np.float32)))
        return module.to(kind).eval()

    if case == "transformer":
        with torch.device("cpu"):
            model = filled(reference.KontextTransformer(**TRANSFORMER, qk_norm="rms_norm"))
        x = {k: torch.from_numpy(v).to(kind) for k, v in transformer_inputs().items()}
        return lambda: model(x["latents"], x["context"], x["pooled"], x["timestep"],
                             ref_hidden_states=x["reference"]).sample.float().numpy()
    if case == "decode":
        n = len(VAE["block_out_channels"])
        model = filled(AutoencoderKL(
            **VAE, use_quant_conv=False, use_post_quant_conv=False,
            down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n))
        z = torch.from_numpy(np.moveaxis(normal(0, 1, 64, 64, 16), -1, 1).copy()).to(kind)
        return lambda: model.decode(z).sample.float().numpy()

    from unipic_jax.pipelines.edit import NEGATIVE_PROMPT
    draw = reference.pipeline(MODEL, kind)
    source = Image.open(SOURCE).convert("RGB").resize((128, 96))
    source = np.asarray(source, np.float32) / 255
    return lambda: draw("make it green", normal(0, 1, 16, 12, 16), STEPS, source, NEGATIVE_PROMPT)


def compare(case: str, dtype: str, turns: int) -> dict:
    """Median seconds of both sides, taking turns, and the distance of their results."""
    results, seconds = alternate({"jax": jax_side, "torch": torch_side}, (case, dtype), turns)
    a, b = (results[s].astype(np.float64) for s in ("jax", "torch"))
    median = {s: statistics.median(t) for s, t in seconds.items()}
    return {"case": case, "dtype": dtype, **median, "ratio": median["torch"] / median["jax"],
            "error": float(np.linalg.norm(a - b) / np.linalg.norm(b)), "all": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES + QWEN)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'case':12} {'type':9} {'JAX s':>8} {'PyTorch s':>10} {'times':>6} {'error':>8}")
    for case in args.cases:
        for dtype in args.dtypes:
            rows.append(r := compare(case, dtype, args.turns))
            print(f"{case:12} {dtype:9} {r['jax']:8.3f} {r['torch']:10.3f} {r['ratio']:6.2f} "
                  f"{r['error']:8.1e}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
