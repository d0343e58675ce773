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
import statistics
from pathlib import Path

import numpy as np

from benchmarks import nets
from benchmarks.turns import alternate

ADAMW = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2)
RATE = 1e-3


def batch(net: nets.Net, case: str, size: int) -> dict[str, np.ndarray]:
    """Latents and reference [B, C, h, w], as PyTorch has them."""
    x = net.condition(size) | {"latents": net.latents(0, size),
                               "timestep": np.linspace(1, 999, size, dtype=np.float32)}
    return x | {"reference": net.latents(1, size)} if case == "edit" else x


def jax_side(case: str, size: int, net: nets.Net = nets.NANO):
    """A function that takes a step and returns its loss."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec as P

    from unipic_jax.core import mesh as meshes

    _, params, velocity = nets.in_jax(net, "float32")
    x = {k: jax.device_put(np.moveaxis(a, 1, -1) if a.ndim == 4 else a, P(meshes.BATCH))
         for k, a in batch(net, case, size).items()}
    optimizer = optax.adamw(RATE, **ADAMW)

    def loss(params, x):
        return jnp.mean((velocity(params, **x).astype(jnp.float32) - x["latents"]) ** 2)

    def step(params, state, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    held = params, optimizer.init(params)

    def run() -> float:
        nonlocal held
        *held, value = step(*held, x)
        return float(value)

    return run


def torch_side(case: str, size: int, net: nets.Net = nets.NANO):
    """The same in PyTorch, with diffusers' transformer."""
    import torch

    model, device, under = nets.in_torch(net, "float32")
    x = {k: torch.from_numpy(a).to(device) for k, a in batch(net, case, size).items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, (ADAMW["b1"], ADAMW["b2"]), ADAMW["eps"], ADAMW["weight_decay"])

    def run() -> float:
        with under:
            out = model(x["latents"], x["context"], x["pooled"], x["timestep"],
                        ref_hidden_states=x.get("reference")).sample
        loss = ((out.float() - x["latents"]) ** 2).mean()
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
