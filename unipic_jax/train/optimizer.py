"""AdamW with warm-up, usually a cosine to zero, and gradients clipped by their norm."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from unipic_jax.core import mesh as meshes


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
    muon: bool = False  # orthogonal updates for kernels; AdamW for all else


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
    rate = schedule(cfg, steps)
    update = optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay)
    if cfg.muon:
        matrices = optax.chain(
            optax.trace(MUON_MOMENTUM, nesterov=True), optax.stateless(_orthogonal),
            optax.add_decayed_weights(cfg.weight_decay), optax.scale_by_learning_rate(rate))
        update = optax.partition({True: matrices, False: update}, _are_matrices)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), update)


def _are_matrices(params):
    """Whether a weight is a kernel, but the head's, which is one of tokens."""
    return jax.tree.map_with_path(
        lambda path, _: (names := [part.key for part in path])[-1] == "kernel"
        and "head" not in names, params)


def _orthogonal(updates, params):
    """The nearest orthogonal matrices, nearly, with elements of the size that AdamW's updates have
    (arXiv:2502.16982). Each device computes them whole."""
    return jax.tree.map(_orthogonal_one, updates)


def _orthogonal_one(update):
    """A third axis of a kernel, before the two of a matrix, is that of layers; the axes of a
    convolution's window go in."""
    x = meshes.replicate(update)
    layers = x.shape[0] if x.ndim == 3 else 1
    x = x.reshape(layers, -1, x.shape[-1])
    wide = x.shape[1] < x.shape[2]
    x = x if wide else x.mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    x = (x if wide else x.mT) * MUON_RMS * max(x.shape[1:]) ** 0.5
    x = x.reshape(update.shape)
    spec = meshes.spec_of(update)
    return x if spec is None else jax.reshard(x, spec)


MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
