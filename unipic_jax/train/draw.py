"""Pictures from the parameters in training, as one traceable function."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from unipic_jax.core.params import Tree
from unipic_jax.flow import schedule
from unipic_jax.model import Part
from unipic_jax.models import autoencoder
from unipic_jax.pipelines import generate
from unipic_jax.train import objectives


def make_draw(
    parts: Mapping[str, Part], *, steps: int, guidance_scale: float, dtype
) -> Callable[[Tree, dict, dict | None, jax.Array], jax.Array]:
    """A function (parameters by part, batch, negative prompt, keys [B]) -> pictures float32
    [B, H, W, 3] in [0, 1].

    The batch is one of `train.collate`, of whose targets only the size counts; the negative
    prompt is collated like the batch's own, or None for no guidance. The reference of an edit is
    the mode of the autoencoder's posterior.
    """
    vae, cfg, timing = (parts[n].config for n in ("vae", "transformer", "scheduler"))
    sigmas = schedule.sigmas(timing, steps)

    def draw(params, batch, negative, keys):
        _, H, W, _ = batch["target"].shape
        x = objectives.normal(keys, (H // vae.factor, W // vae.factor, cfg.in_channels))
        encoded = [objectives.conditions(parts, params, prompt, dtype=dtype)
                   for prompt in (batch["prompt"], negative) if prompt is not None]
        if "source" in batch:
            seen = objectives.to_unit(batch["source"], dtype)
            mode = autoencoder.encode(vae, params["vae"], seen).mean.astype(jnp.float32)
            for condition in encoded:
                condition["reference"] = autoencoder.scale(vae, mode)
        x = generate.denoise(
            cfg, params["transformer"], x, sigmas=sigmas, first=0, positive=encoded[0],
            negative=encoded[1] if len(encoded) > 1 else None, scale=guidance_scale, steps=steps,
            dtype=dtype, timesteps=timing.num_train_timesteps)
        out = autoencoder.decode(vae, params["vae"], autoencoder.unscale(vae, x).astype(dtype))
        return jnp.clip(out.astype(jnp.float32) * 0.5 + 0.5, 0, 1)

    return draw
