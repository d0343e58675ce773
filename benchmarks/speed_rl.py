"""Flow-GRPO's speed against a PyTorch loop as the public trainer has it, turn by turn.

    python -m benchmarks.speed_rl [--turns 5] [--batch 64] [--json F]

The nano transformer as a policy with adapters of rank 32 on text to image, groups of 16, 10 steps,
float32, all cores (for JAX, a device each); each side in a process of its own that waits while the
other works. PyTorch:
diffusers' transformer, PEFT's adapters, sampling step by step, then a forward and a backward a
step. Three parts of a whole step are timed: the rollout, the update, and both with the advantages
between. "full" trains nine steps with a divergence from the reference, "window" two without.
Rewards are fixed numbers, so that nothing else is measured. The noise of the two sides differs, and
so do their trajectories; that the computation is the same is what the tests' goldens show.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np

from benchmarks import nets
from benchmarks.speed import normal
from benchmarks.turns import alternate

RANK, ALPHA, RATE, STEPS, NOISE, GROUP = 32, 64.0, 3e-4, 10, 0.7, 16
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
           "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
RECIPES = {"full": (STEPS - 1, 0.04), "window": (2, 0.0)}  # trained steps, weight of divergence
PARTS = ("rollout", "update", "whole")
CLIP, EPS = 1e-4, 1e-4


def levels() -> np.ndarray:
    t = np.linspace(1, 1 / 1000, STEPS)
    return np.append(3 * t / (1 + 2 * t), 0.0)


def inputs(net: nets.Net, size: int) -> dict[str, np.ndarray]:
    """Conditions of each sample, and rewards."""
    return net.condition(size) | {"reward": normal(4, size)}


def jax_side(recipe: str, size: int, part: str, net: nets.Net = nets.NANO):
    """A function that does a part of a step and returns the gradient's norm, or 0."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec as P

    from unipic_jax.core import lora, params
    from unipic_jax.core import mesh as meshes
    from unipic_jax.models import mmdit
    from unipic_jax.rl import learn, rollout
    from unipic_jax.rl import step as steps
    from unipic_jax.rl.objective import Grpo

    window, kl = RECIPES[recipe]
    cfg, base, velocity = nets.in_jax(net, net.dtype)
    adapters = jax.device_put(params.init(
        lora.specs(mmdit.specs(cfg), mmdit.LORA_TARGETS, RANK), jax.random.key(0)), P())

    def reference(frozen, condition, x, sigma):
        timestep = jnp.broadcast_to(sigma * 1000, x.shape[:1])
        return velocity(frozen, x, timestep, **condition)

    def policy(trained, frozen, condition, x, sigma):
        return reference(lora.join(frozen, trained, ALPHA / RANK), condition, x, sigma)

    ids, valid = np.arange(size), np.ones(size, bool)
    x, ids, valid = jax.device_put((inputs(net, size), ids, valid), P(meshes.BATCH))
    batch = {"positive": {k: x[k] for k in ("context", "pooled")}, "id": ids, "group": ids // GROUP}
    how = learn.Config(dataclasses.replace(Grpo(), kl=kl), ema=0.0)
    drawing = rollout.Config(steps=STEPS, noise=NOISE, window=window)
    sigmas, optimizer = levels(), optax.adamw(RATE)
    shape = net.side, net.side, cfg.in_channels
    sample = jax.jit(steps.make_rollout(how, drawing, sigmas, policy, shape))
    update = jax.jit(steps.make_update(how, drawing, sigmas, policy, reference, optimizer,
                                       optax.constant_schedule(RATE)))
    state, key = learn.new(how, adapters, optimizer), jax.random.key(1)
    drawn = jax.block_until_ready(sample(state, base, batch, key))

    def run() -> float:
        trajectory = drawn if part == "update" else sample(state, base, batch, key)
        if part == "rollout":
            jax.block_until_ready(trajectory)
            return 0.0
        _, report = update(state, base, batch, trajectory, x["reward"], valid, key)
        return float(report["grad_norm"][0])

    return run


def torch_side(recipe: str, size: int, part: str, net: nets.Net = nets.NANO):
    """The same in PyTorch."""
    import torch
    from peft import LoraConfig

    window, kl = RECIPES[recipe]
    model, device, under = nets.in_torch(net, net.dtype)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian",
                                 target_modules=list(TARGETS)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE)
    x = {k: torch.from_numpy(a).to(device) for k, a in inputs(net, size).items()}
    sigma = levels()
    rng = torch.Generator(device).manual_seed(0)
    noise = functools.partial(torch.randn, generator=rng, device=device)

    def velocity(latents, i):
        timestep = torch.full((size,), float(sigma[i] * 1000), device=device)
        with under:
            return model(latents, x["context"], x["pooled"], timestep).sample.float()

    def step(latents, v, i, following=None):
        """Where a stochastic step leads, its mean and log-probability (Flow-GRPO's code)."""
        s, dt = sigma[i], sigma[i + 1] - sigma[i]
        std = NOISE * math.sqrt(s / (1 - (sigma[1] if s == 1 else s)))
        mean = latents * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        spread = std * math.sqrt(-dt)
        if following is None:
            following = mean + spread * noise(latents.shape)
        log_prob = (-((following - mean) ** 2) / (2 * spread**2) - math.log(spread)
                    - math.log(math.sqrt(2 * math.pi)))
        return following, mean, log_prob.mean((1, 2, 3)), spread

    @torch.no_grad()
    def sample():
        latents = noise((size, model.config.in_channels, net.side, net.side))
        kept, log_probs = [latents], []
        for i in range(STEPS):
            v = velocity(latents, i)
            if i < window:
                latents, _, log_prob, _ = step(latents, v, i)
                kept.append(latents)
                log_probs.append(log_prob)
            else:
                latents = latents + float(sigma[i + 1] - sigma[i]) * v
        return kept, log_probs

    def update(kept, log_probs) -> float:
        groups = x["reward"].view(-1, GROUP)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (
            groups.std(1, keepdim=True, unbiased=False) + EPS)).view(-1).clamp(-5, 5)
        optimizer.zero_grad()
        for i in range(window):
            _, mean, log_prob, spread = step(kept[i], velocity(kept[i], i), i, kept[i + 1])
            ratio = torch.exp(log_prob - log_probs[i])
            loss = torch.maximum(-advantage * ratio,
                                 -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            if kl:
                with torch.no_grad():
                    model.disable_adapters()
                    _, before, _, _ = step(kept[i], velocity(kept[i], i), i, kept[i + 1])
                    model.enable_adapters()
                loss = loss + kl * ((mean - before) ** 2 / (2 * spread**2)).mean()
            (loss / window).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return norm.item()

    drawn = sample()

    def run() -> float:
        trajectory = drawn if part == "update" else sample()
        return 0.0 if part == "rollout" else update(*trajectory)

    return run


def compare(recipe: str, size: int, part: str, turns: int) -> dict:
    """Samples a second of both sides by the median of the turns."""
    _, seconds = alternate({"jax": jax_side, "torch": torch_side}, (recipe, size, part), turns)
    rate = {s: size / statistics.median(t) for s, t in seconds.items()}
    return {"recipe": recipe, "part": part, "batch": size, **rate,
            "ratio": rate["jax"] / rate["torch"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'recipe':8}{'part':9}{'JAX samples/s':>14}{'PyTorch samples/s':>19}{'times':>7}")
    for recipe in RECIPES:
        for part in PARTS:
            rows.append(r := compare(recipe, args.batch, part, args.turns))
            print(f"{recipe:8}{part:9}{r['jax']:14.1f}{r['torch']:19.1f}{r['ratio']:7.2f}",
                  flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
