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
    multiple = 2 * pipeline.size_multiple(parts)  # the release's 32
    sizes = {images.edit_size(*p.size, image_size, multiple) for p in pictures}
    if len(sizes) > 1:
        raise InputError(f"pictures of one batch come to different sizes: {sorted(sizes)}; edit "
                         "them one by one")
    width, height = sizes.pop()
    pictures = [images.to_rgb(p).resize((width, height)) for p in pictures]
    pixels = np.stack([images.to_array(p) for p in pictures]).astype(options.vae_dtype)

    one_each = pipeline.latent_shape(parts, len(pictures), height, width)
    shape = (len(pictures) * options.images_per_prompt, *one_each[1:])
    latents = pipeline.initial_latents(shape, options.seed, latents)
    noise = None
    if sample_reference or reference_noise is not None:
        # Another stream than the initial latents', which take the seed itself.
        noise = pipeline.initial_latents(one_each, options.seed + 2**31, reference_noise)
    vae = parts["vae"].config
    reference = _encode(vae, parts.load("vae", options.vae_dtype), pixels, noise)
    reference = jnp.repeat(reference, options.images_per_prompt, 0)

    conditions = pipeline.encode_prompts(parts, prompts, negative_prompt, options, pictures)
    for condition in filter(None, conditions[:2]):
        condition["reference"] = reference
    return pipeline.draw(parts, latents, conditions, options)


def edit_in_turns(
    parts: Parts, picture: Image.Image, prompts: list[str], *args, options: Options = Options(),
    **kw
) -> Drawn:
    """A picture edited by the first prompt, what comes of it by the second, and so on; a row of
    the result a turn. The rest as in `edit`, which each turn is."""
    if options.images_per_prompt != 1:
        raise InputError("edits in turns have one picture each; leave --images-per-prompt at 1")
    turns = []
    for prompt in prompts:
        turns.append(edit(parts, [picture], [prompt], *args, options=options, **kw))
        picture = images.to_picture(turns[-1].pictures[0])
    return Drawn(*(np.concatenate(a) for a in zip(*((t.pictures, t.latents) for t in turns))))


@functools.partial(jax.jit, static_argnames=("cfg",))
def _encode(cfg, params, pictures, noise):
    """Pictures [B, H, W, 3] in [-1, 1] -> the transformer's latents, float32."""
    posterior = autoencoder.encode(cfg, params, pictures)
    posterior = jax.tree.map(lambda a: a.astype(jnp.float32), posterior)
    z = posterior.mean if noise is None else posterior.sample(noise)
    return autoencoder.scale(cfg, z)
