"""AdamW with warm-up, usually a cosine to zero, and gradients clipped by their norm."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of UniPic 2.0's pre-training (section 3.1 of its report); warm-up
    and clipping, which it leaves out, are of the code family it comes from."""

    learning_rate: float = 4e-5
    warmup: float = 0.01  # of all steps
    cosine: bool = True  # after warm-up down to zero; or constant
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0  # the largest norm of all gradients together


def schedule(cfg: Config, steps: int) -> optax.Schedule:
    """The learning rate over `steps` steps: linear from zero, then a half cosine to zero, or
    constant."""
    warmup = round(cfg.warmup * steps)
    if not cfg.cosine:
        rising = optax.linear_schedule(0.0, cfg.learning_rate, max(warmup, 1))
        return rising if warmup else optax.constant_schedule(cfg.learning_rate)
    warmup = max(1, warmup)
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup, max(steps, warmup + 1))


def make(cfg: Config, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(schedule(cfg, steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay))
