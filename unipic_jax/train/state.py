"""What training carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unipic_jax.core.params import Tree


@flax.struct.dataclass
class State:
    """Everything that a step changes, and so everything that a checkpoint holds."""

    step: jax.Array  # int32: steps taken, which is also the index of the next batch
    params: Tree  # float32, what trains: by part, then as the part's specs have it
    opt: optax.OptState
    ema: Tree | None  # the mean of the parameters over the last steps
    skipped: jax.Array  # int32: steps that changed nothing, for they were not finite
    skipped_in_row: jax.Array  # int32: of these the last ones without a break


def new(params: Tree, optimizer: optax.GradientTransformation, *, ema: bool) -> State:
    """The state before the first step of training `params`."""
    return State(
        step=jnp.int32(0), params=params, opt=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=jnp.int32(0), skipped_in_row=jnp.int32(0))
