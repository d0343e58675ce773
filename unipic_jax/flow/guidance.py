"""Guidance: a velocity made of several conditional ones.

A conditional velocity is `f(x, sigma, condition)`, where `condition` is a tree of arrays with a
leading batch axis, or None at leaves that are absent.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from unipic_jax.flow.sample import Velocity


@dataclasses.dataclass(frozen=True)
class SkipLayer:
    """Skip-layer guidance: the blocks to leave out, its weight, and the part of the steps that it
    acts in; the defaults are the release's."""

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2


def conditional(f: Callable, condition) -> Velocity:
    """The velocity under one condition, unguided."""
    return lambda x, sigma, index: f(x, sigma, condition)


def classifier_free(f: Callable, positive, negative, scale: float | jax.Array) -> Velocity:
    """n + scale (p - n), both halves in one batch in the order [negative, positive]
    (Ho and Salimans, 2022)."""

    def velocity(x, sigma, index):
        return _guided(f, x, sigma, positive, negative, scale)[0]

    return velocity


def three_way(
    f: Callable, positive, negative, blank, scale: float | jax.Array, image_scale: float | jax.Array
) -> Velocity:
    """b + image_scale (n - b) + scale (p - n), where `positive` has the text and the picture,
    `negative` the picture and `blank` neither (InstructPix2Pix, Brooks et al. 2023; MetaQuery's
    own edits). `blank` goes through the network by itself, for its tokens may be fewer."""

    def velocity(x, sigma, index):
        b = _float32(f(x, sigma, blank))
        n, p = _halves(f, x, sigma, positive, negative)
        return b + image_scale * (n - b) + scale * (p - n)

    return velocity


def skip_layer(
    f: Callable, f_skip: Callable, positive, negative, scale: float | jax.Array, skip: SkipLayer,
    steps: int | jax.Array,
) -> Velocity:
    """Classifier-free guidance that also leads away from `f_skip`, the same network without some
    of its blocks: + skip.scale (p - p_skip) where start N < step < stop N (Stable Diffusion 3.5's
    recipe)."""

    def velocity(x, sigma, index):
        guided, p = _guided(f, x, sigma, positive, negative, scale)
        active = (index > steps * skip.start) & (index < steps * skip.stop)
        return lax.cond(
            active, lambda: guided + skip.scale * (p - _float32(f_skip(x, sigma, positive))),
            lambda: guided)

    return velocity


def _guided(f, x, sigma, positive, negative, scale):
    n, p = _halves(f, x, sigma, positive, negative)
    return n + scale * (p - n), p


def _halves(f, x, sigma, positive, negative):
    both = jax.tree.map(lambda n, p: jnp.concatenate([n, p]), negative, positive)
    return jnp.split(_float32(f(jnp.concatenate([x, x]), sigma, both)), 2)


def _float32(v):
    return v.astype(jnp.float32)
