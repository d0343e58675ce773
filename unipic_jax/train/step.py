"""One training step of any stage: gradients over micro-batches, the update, and what to report."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.core.params import Tree
from unipic_jax.train.state import State

Batch = dict[str, Any]  # arrays with a leading axis of all samples
Loss = Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""(what trains, what is frozen, batch [B, ...], keys [B]) -> (loss of each sample [B], and more
figures of each sample [B] by name)"""

QUARTERS = 4  # of the noise levels, by which the loss is reported


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, schedule: optax.Schedule, *,
    micro_batches: int = 1, ema: float = 0.0,
) -> Callable[[State, Tree, Batch, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The step (state, frozen, batch, key) -> (state, metrics), to be jitted with its state
    donated.

    The gradient is that of the mean loss over the batch, summed over `micro_batches` equal parts
    of it in a scan. Every sample draws from its own key, made of the step and its row, so that
    neither devices nor micro-batches change what is drawn. `ema` is the decay of the parameters'
    mean, 0 for none. A step whose loss or gradient is not finite changes nothing but the counts.
    Metrics are float32 scalars, but "quarter_loss" and "quarter_count" [4], by noise level.
    """

    def gradients(params, frozen, batch, key):
        B = len(jax.tree.leaves(batch)[0])

        def one(rows, samples):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

            def mean(params):
                each, more = loss(params, frozen, samples, keys)
                return jnp.sum(each) / B, {"loss": each} | more

            return jax.grad(mean, has_aux=True)(params)

        def add(total, micro):
            gradient, more = one(*micro)
            return jax.tree.map(jnp.add, total, gradient), more

        if micro_batches == 1:  # XLA is several times slower on a CPU inside a loop
            return one(_rows(batch), batch)
        parts = jax.tree.map(lambda x: split(x, micro_batches), (_rows(batch), batch))
        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)

    def step(state: State, frozen: Tree, batch: Batch, key: jax.Array):
        gradient, each = gradients(state.params, frozen, batch,
                                   jax.random.fold_in(key, state.step))
        metrics = {name: jnp.mean(x) for name, x in each.items() if name != "sigma"}
        metrics["learning_rate"] = schedule(state.step)
        if "sigma" in each:
            metrics |= _by_quarter(each["loss"], each["sigma"])
        state, more = advance(state, gradient, metrics["loss"], optimizer, ema=ema)
        return state, metrics | more

    return step


def advance(
    state: State, gradient: Tree, loss: jax.Array, optimizer: optax.GradientTransformation, *,
    ema: float = 0.0, ema_every: int = 1,
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one update, and what to report of it.

    Where the loss or the gradient is not finite nothing changes but the counts. The mean of the
    parameters, where `ema` is not 0, takes in those after every `ema_every` steps.
    """
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt = optimizer.update(gradient, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    mean = ema and _averaged(state.ema, params, state.step, ema, ema_every)
    params, opt, mean = jax.tree.map(
        lambda n, o: jnp.where(finite, n, o), (params, opt, mean),
        (state.params, state.opt, ema and state.ema))
    state = state.replace(
        step=state.step + 1, params=params, opt=opt, ema=mean if ema else None,
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1))
    return state, {"grad_norm": norm, "skipped": state.skipped,
                   "skipped_in_row": state.skipped_in_row}


def _rows(batch):
    """Indices [B], spread over devices as the batch is."""
    leaf = jax.tree.leaves(batch)[0]
    rows = jnp.arange(len(leaf))
    spec = meshes.spec_of(leaf)
    return rows if spec is None else jax.reshard(rows, P(spec[0]))


def split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], sample i in part i mod `parts`; each device's samples
    stay on it."""
    spec, shape = meshes.spec_of(x), (len(x) // parts, parts, *x.shape[1:])
    out = None if spec is None else P(spec[0], None, *spec[1:])
    return jnp.reshape(x, shape, out_sharding=out).swapaxes(0, 1)


def _averaged(mean, params, step, decay, every):
    """The mean with the parameters after this step; over the first steps a plain one."""
    decay = jnp.minimum(decay, (step + 1.0) / (step + 10.0))
    share = jnp.where((step + 1) % every == 0, 1 - decay, 0.0)
    return jax.tree.map(lambda m, p: m + share * (p - m), mean, params)


def _by_quarter(loss, sigma):
    quarter = jnp.clip((sigma * QUARTERS).astype(jnp.int32), 0, QUARTERS - 1)
    one_hot = (quarter[..., None] == jnp.arange(QUARTERS)).astype(jnp.float32)
    samples = range(loss.ndim)
    count = one_hot.sum(samples)
    return {"quarter_loss": (one_hot * loss[..., None]).sum(samples) / jnp.maximum(count, 1),
            "quarter_count": count}
