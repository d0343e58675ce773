"""The noise schedule of rectified flow: x_sigma = (1 - sigma) x_0 + sigma noise.

Reference: `FlowMatchEulerDiscreteScheduler` of diffusers, whose constructor shifts its end point
and whose grid is then shifted again.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.core import config


@dataclasses.dataclass(frozen=True)
class Config:
    """`scheduler_config.json`, under its own names."""

    num_train_timesteps: int = 1000
    shift: float = 1.0

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        off = {k: (False,) for k in ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas",
                                     "use_exponential_sigmas", "use_beta_sigmas",
                                     "stochastic_sampling")}
        return config.parse(
            cls, raw, where, fixed=off | {"shift_terminal": (None,)},
            # These say how dynamic shifting would be done.
            ignored=("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift",
                     "time_shift_type"))


def shifted(cfg: Config, u):
    """s u / (1 + (s - 1) u): times moved towards the noise (Stable Diffusion 3, section 5.3.2)."""
    return cfg.shift * u / (1 + (cfg.shift - 1) * u)


def draw(cfg: Config, keys: jax.Array) -> jax.Array:
    """A noise level float32 [B] in (0, 1] for each key [B]: one of the `num_train_timesteps`
    levels of the scheduler, all as likely (the "none" weighting of diffusers' training code)."""
    T = cfg.num_train_timesteps
    index = jax.vmap(lambda key: jax.random.randint(key, (), 1, T + 1))(keys)
    return shifted(cfg, index.astype(jnp.float32) / T)


def sigmas(cfg: Config, steps: int) -> np.ndarray:
    """Noise levels of `steps` Euler steps, from 1 down to 0: float32 [steps + 1]."""
    T = cfg.num_train_timesteps
    last = shifted(cfg, np.float32(1 / T))
    # In float32 and by way of the timesteps, so that even the rounding is the reference's.
    grid = np.linspace(T, float(last) * T, steps).astype(np.float32) / np.float32(T)
    return np.append(shifted(cfg, grid).astype(np.float32), np.float32(0))
