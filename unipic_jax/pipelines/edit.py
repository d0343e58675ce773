"""A picture and an instruction in, the edited picture out."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unipic_jax.convert.load import Parts
from unipic_jax.core import images
from unipic_jax.core.errors import InputError
from unipic_jax.models import autoencoder
from unipic_jax.pipelines import generate as pipeline
from unipic_jax.pipelines.generate import Drawn, Options

NEGATIVE_PROMPT = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, "
    "damaged details, artifacts, glitch, noise, pixelated, grainy, compression artifacts, bad "
    "composition, wrong proportion, incomplete editing, unfinished, unedited areas.")
"""What the released editing script steers away from."""


def edit(
    parts: Parts, pictures: Sequence[Image.Image], prompts: list[str],
    negative_prompt: str = NEGATIVE_PROMPT, *, image_size: int = 512,
    latents: np.ndarray | None = None, reference_noise: np.ndarray | None = None,
    sample_reference: bool = False, options: Options = Options(),
) -> Drawn:
    """Each picture edited by its prompt, `images_per_prompt` times.

    image_size: pixels of the longer side; all pictures must come to the same size. The reference
    is the mode of the autoencoder's posterior, or a sample of it: drawn from the seed
    (`sample_reference`), or by `reference_noise`, standard normal [B, h, w, C] for B pictures.
    Raises InputError for pictures, sizes or arrays that do not fit.
    """
    images.check_size("image size", image_size, pipeline.size_multiple(parts))
    if len(pictures) != len(prompts):
        raise InputError(f"{len(pictures)} pictures for {len(prompts)} prompts; give one each")
    sizes = {images.edit_size(*p.size, image_size) for p in pictures}
    if len(sizes) > 1:
        raise InputError(f"pictures of one batch come to different sizes: {sorted(sizes)}; edit "
                         "them one by one")
    width, height = sizes.pop()
    resized = np.stack([images.to_array(images.to_rgb(p).resize((width, height)))
                        for p in pictures])

    one_each = pipeline.latent_shape(parts, len(pictures), height, width)
    shape = (len(pictures) * options.images_per_prompt, *one_each[1:])
    latents = pipeline.initial_latents(shape, options.seed, latents)
    noise = None
    if sample_reference or reference_noise is not None:
        # Another stream than the initial latents', which take the seed itself.
        noise = pipeline.initial_latents(one_each, options.seed + 2**31, reference_noise)
    vae = parts["vae"].config
    reference = _encode(vae, parts.load("vae", options.vae_dtype),
                        resized.astype(options.vae_dtype), noise)
    reference = jnp.repeat(reference, options.images_per_prompt, 0)

    positive, negative = pipeline.encode_prompts(parts, prompts, negative_prompt, options)
    positive |= {"reference": reference}
    if negative is not None:
        negative |= {"reference": reference}
    return pipeline.draw(parts, latents, positive, negative, options)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _encode(cfg, params, pictures, noise):
    """Pictures [B, H, W, 3] in [-1, 1] -> the transformer's latents, float32."""
    posterior = autoencoder.encode(cfg, params, pictures)
    posterior = jax.tree.map(lambda a: a.astype(jnp.float32), posterior)
    z = posterior.mean if noise is None else posterior.sample(noise)
    return autoencoder.scale(cfg, z)
