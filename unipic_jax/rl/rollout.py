"""Sampling a batch with the steps that are to be trained recorded: one scan over all steps.

A batch is a dict of arrays with a leading axis of all samples: "positive", the conditions of each
sample; "negative", those that guidance leads away from; "group" and "id", int32 [B], the group
(below B) and the global index of each sample; and whatever else the reward reads.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.flow import guidance, transition
from unipic_jax.train.step import Batch

Policy = Callable[[Tree, Tree, Tree, jax.Array, jax.Array], jax.Array]
"""(what trains, what is frozen, conditions [B, ...], x [B, ...], sigma, a scalar or [B])
-> velocity [B, ...]"""

PLACES = ("fixed", "random", "moving")


@dataclasses.dataclass(frozen=True)
class Config:
    """How samples are drawn; the defaults are UniPic 2.0's, with
    Flow-GRPO's guidance off."""

    steps: int = 10
    kind: str = "sde"  # or "cps"; see `flow.transition`
    noise: float = 0.7
    guidance_scale: float = 1.0  # off at 1 and below
    window: int = 0  # steps that are stochastic and train; 0 for all but the last, as is usual
    place: str = "fixed"  # of the window: "random" (Flow-GRPO-Fast), "moving" (MixGRPO)
    span: tuple[int, int] = (0, 0)  # the steps it stays in; (0, 0) for all but the last
    every: int = 25  # rollouts after which a moving one moves a step

    def __post_init__(self):
        first, end = self.bounds
        if self.place not in PLACES:
            raise InputError(f"window {self.place!r}: choose from {', '.join(PLACES)}")
        if not 0 <= first < first + self.size <= end < self.steps:
            raise InputError(f"a window of {self.size} of steps {first} to {end} does not fit "
                             f"{self.steps} steps, the last of which is never stochastic")

    @property
    def bounds(self) -> tuple[int, int]:
        """The first step of the window's span, and its end."""
        return self.span if self.span[1] else (0, self.steps - 1)

    @property
    def size(self) -> int:
        return self.window or self.bounds[1] - self.bounds[0]


@flax.struct.dataclass
class Trajectory:
    """What the update needs of a rollout; float32."""

    x: jax.Array  # [B, w + 1, ...]: before each step of the window, and after its last
    log_prob: jax.Array  # [B, w], as the rollout computed it
    latents: jax.Array  # [B, ...], after all steps
    start: jax.Array  # int32: the window's first step


def window_start(cfg: Config, key: jax.Array, iteration: jax.Array) -> jax.Array:
    """The first step (int32) of the window of a rollout."""
    first, end = cfg.bounds
    places = end - cfg.size - first + 1
    if cfg.place == "random":
        return first + jax.random.randint(key, (), 0, places)
    if cfg.place == "moving":
        return jnp.int32(first + iteration // cfg.every % places)
    return jnp.int32(first)


def guided(policy: Policy, cfg: Config) -> Policy:
    """The velocity under a batch's conditions, with guidance where it is on; float32."""

    def velocity(weights, frozen, batch, x, sigma):
        def f(x, sigma, condition):
            return policy(weights, frozen, condition, x, sigma)

        if cfg.guidance_scale > 1:
            v = guidance.classifier_free(f, batch["positive"], batch["negative"],
                                         cfg.guidance_scale)
        else:
            v = guidance.conditional(f, batch["positive"])
        return v(x, sigma, None).astype(jnp.float32)

    return velocity


def normal(key: jax.Array, ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], each sample keyed by its id [B]."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(ids)


def make_rollout(
    cfg: Config, sigmas: np.ndarray, policy: Policy, shape: tuple[int, ...]
) -> Callable[[Tree, Tree, Batch, jax.Array, jax.Array], Trajectory]:
    """A function (weights, frozen, batch, key, iteration) -> trajectory of samples of `shape`.

    sigmas [N + 1] are the levels of `cfg.steps` steps. Noise depends on the key, the step and a
    sample's id alone. The window's start is traced, so that one program serves all of them.
    """
    if len(sigmas) != cfg.steps + 1:
        raise InputError(f"{len(sigmas) - 1} levels are given for {cfg.steps} steps")
    stochastic = transition.make(cfg.kind, sigmas, cfg.noise)
    euler = transition.make(cfg.kind, sigmas, 0.0)
    velocity, w = guided(policy, cfg), cfg.size

    def rollout(weights, frozen, batch, key, iteration):
        initial, noises, place = jax.random.split(key, 3)
        start = window_start(cfg, place, iteration)
        x = normal(initial, batch["id"], shape)

        def body(carry, now):
            x, kept = carry
            index, noisy, plain = now
            inside = (start <= index) & (index < start + w)
            step = jax.tree.map(lambda a, b: jnp.where(inside, a, b), noisy, plain)
            v = velocity(weights, frozen, batch, x, step.sigma)
            noise = normal(jax.random.fold_in(noises, index), batch["id"], shape)
            following = transition.advance(step, x, v, noise)
            # States outside the window go to a last place that is thrown away.
            place = jnp.where(inside | (index == start + w), index - start, w + 1)
            kept = lax.dynamic_update_slice_in_dim(kept, x[:, None], place, 1)
            return (following, kept), transition.log_prob(step, x, v, following)

        kept = jnp.repeat(jnp.zeros_like(x)[:, None], w + 2, 1)
        (latents, kept), log_prob = lax.scan(
            body, (x, kept), (jnp.arange(cfg.steps), stochastic, euler))
        log_prob = lax.dynamic_slice_in_dim(log_prob, start, w).swapaxes(0, 1)
        return Trajectory(kept[:, :-1], log_prob, latents, start)

    return rollout


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """Trajectories of parts of one batch, sampled with the same key, as one."""
    x, log_prob, latents = (jnp.concatenate([getattr(p, n) for p in parts])
                            for n in ("x", "log_prob", "latents"))
    return Trajectory(x, log_prob, latents, parts[0].start)
