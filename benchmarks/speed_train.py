"""Training's speed against PyTorch: the same nano transformer, batch and AdamW, turn by turn.

    python -m benchmarks.speed_train [--turns 15] [--batch 64] [--json F]

Each side runs in a process of its own that waits while the other works, on all cores (for JAX, a
device each), in float32: the loss, its gradient, the update. t2i: 36
image tokens; edit: 36 more of the reference; both with 48 of text. Times are of a step, after two
that are not counted; the error is the relative distance of the losses of the second step, so that
what is compared is the same computation.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import numpy as np

from benchmarks.speed import jax_weights, normal, value
from benchmarks.turns import alternate

NANO = dict(
    num_layers=4, attention_head_dim=64, num_attention_heads=2, in_channels=4, out_channels=4,
    patch_size=2, joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128,
    pos_embed_max_size=8, dual_attention_layers=(0, 1), sample_size=16)
ADAMW = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2)
RATE, SIDE, TEXT = 1e-3, 12, 48


def batch(case: str, size: int) -> dict[str, np.ndarray]:
    """Latents and reference [B, C, h, w], as PyTorch has them."""
    x = {"latents": normal(0, size, 4, SIDE, SIDE), "context": normal(2, size, TEXT, 128),
         "pooled": normal(3, size, 128), "timestep": np.linspace(1, 999, size, dtype=np.float32)}
    return x | {"reference": normal(1, size, 4, SIDE, SIDE)} if case == "edit" else x


def jax_side(case: str, size: int):
    """A function that takes a step and returns its loss."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec as P

    from unipic_jax.core import mesh as meshes
    from unipic_jax.models import mmdit

    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    jax.set_mesh(meshes.make(data=-1, fsdp=1))
    cfg = mmdit.Config(**NANO)
    x = {k: jax.device_put(np.moveaxis(a, 1, -1) if a.ndim == 4 else a, P(meshes.BATCH))
         for k, a in batch(case, size).items()}
    optimizer = optax.adamw(RATE, **ADAMW)

    def loss(params, x):
        return jnp.mean((mmdit.apply(cfg, params, **x) - x["latents"]) ** 2)

    def step(params, state, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.device_put(jax_weights(mmdit, cfg, jnp.float32), P())
    held = params, optimizer.init(params)

    def run() -> float:
        nonlocal held
        *held, value = step(*held, x)
        return float(value)

    return run


def torch_side(case: str, size: int):
    """The same in PyTorch, with diffusers' transformer."""
    import torch

    from benchmarks.reference import KontextTransformer

    torch.set_num_threads(os.cpu_count())
    model = KontextTransformer(**NANO, qk_norm="rms_norm")
    with torch.no_grad():
        for name, p in model.state_dict().items():
            p.copy_(torch.from_numpy(value(name, tuple(p.shape)).astype(np.float32)))
    x = {k: torch.from_numpy(a) for k, a in batch(case, size).items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, (ADAMW["b1"], ADAMW["b2"]), ADAMW["eps"], ADAMW["weight_decay"])

    def run() -> float:
        out = model(x["latents"], x["context"], x["pooled"], x["timestep"],
                    ref_hidden_states=x.get("reference")).sample
        loss = ((out - x["latents"]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def compare(case: str, size: int, turns: int) -> dict:
    """Samples a second of both sides by the median of the turns, and the losses' distance."""
    losses, seconds = alternate({"jax": jax_side, "torch": torch_side}, (case, size), turns)
    rate = {s: size / statistics.median(t) for s, t in seconds.items()}
    return {"case": case, "batch": size, **rate, "ratio": rate["jax"] / rate["torch"],
            "best": min(seconds["torch"]) / min(seconds["jax"]),
            "error": abs(losses["jax"] / losses["torch"] - 1), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'case':6} {'JAX samples/s':>14} {'PyTorch samples/s':>18} {'times':>6} "
          f"{'of best':>8} {'error':>8}")
    for case in ("t2i", "edit"):
        rows.append(r := compare(case, args.batch, args.turns))
        print(f"{case:6} {r['jax']:14.1f} {r['torch']:18.1f} {r['ratio']:6.2f} {r['best']:8.2f} "
              f"{r['error']:8.1e}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
