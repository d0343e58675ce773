"""A transformer small enough to be learned from in a test, as a policy with adapters or with all
its weights, and batches for it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unipic_jax.core import lora, params
from unipic_jax.core import mesh as meshes
from unipic_jax.flow import schedule
from unipic_jax.models import mmdit

CFG = mmdit.Config(
    num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=4,
    patch_size=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
    pos_embed_max_size=8, dual_attention_layers=(0,), sample_size=4)
SPECS = mmdit.specs(CFG)
RANK, SCALE = 4, 2.0
ADAPTERS = lora.specs(SPECS, mmdit.LORA_TARGETS, RANK)
SHAPE = (4, 4, CFG.in_channels)
SIGMAS = schedule.sigmas(schedule.Config(1000, 3.0), 10)
B, GROUP = 8, 4


def weights(seed=0):
    """Every weight at random, so that none is at its trivial initial value."""
    leaves, tree = jax.tree.flatten(SPECS, is_leaf=params.is_spec)
    draw = np.random.default_rng(seed)
    return tree.unflatten([
        (1.0 * (len(s.shape) == 1 and s.init is jax.nn.initializers.ones)
         + 0.2 * draw.normal(size=s.shape)).astype(np.float32) for s in leaves])


def adapters():
    """Fresh ones: lora_b is zero."""
    return jax.tree.map(np.asarray, params.init(ADAPTERS, jax.random.key(5)))


def make_policy(dtype=jnp.float32, remat="attention"):
    """(policy, reference): the transformer with adapters joined to frozen["base"], and without."""

    def reference(frozen, condition, x, sigma):
        timestep = jnp.broadcast_to(sigma * 1000, x.shape[:1])
        return mmdit.apply(CFG, frozen["base"], x, timestep, **condition, remat=remat, dtype=dtype)

    def policy(trained, frozen, condition, x, sigma):
        return reference({"base": lora.join(frozen["base"], trained, SCALE)}, condition, x, sigma)

    return policy, reference


def batch(size=B, seed=1):
    draw = np.random.default_rng(seed)

    def condition():
        return {"context": draw.normal(size=(size, 3, CFG.joint_attention_dim)).astype(np.float32),
                "pooled": draw.normal(size=(size, CFG.pooled_projection_dim)).astype(np.float32)}

    return {"positive": condition(), "negative": condition(),
            "group": np.arange(size, dtype=np.int32) // GROUP,
            "id": np.arange(size, dtype=np.int32)}


def reward(frozen, batch, latents):
    """The mean of the first channel, all valid."""
    value = latents[..., 0].mean((1, 2))
    return value, jnp.isfinite(value)


def on(mesh, trained, frozen, here):
    """Adapters, base and batch on a mesh."""
    return (jax.device_put(trained, params.shardings(ADAPTERS, mesh)),
            {"base": jax.device_put(frozen["base"], params.shardings(SPECS, mesh))},
            jax.tree.map(lambda a: jax.device_put(a, NamedSharding(
                mesh, P(meshes.BATCH, *[None] * (a.ndim - 1)))), here))
