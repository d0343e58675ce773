"""Text to pictures: prompts in, pictures out. `edit` adds a reference to the same steps."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image
from tqdm import tqdm

from unipic_jax.conditioning import kontext, metaquery
from unipic_jax.convert.load import Parts
from unipic_jax.core import images
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.flow import guidance, schedule
from unipic_jax.flow.sample import sample
from unipic_jax.model import config_file
from unipic_jax.models import autoencoder, mmdit

REQUIRED = ("transformer", "vae", "scheduler")


@dataclasses.dataclass(frozen=True)
class Options:
    """How pictures are drawn; the defaults are the release's."""

    steps: int = 50
    guidance_scale: float = 3.5  # off at 1 and below
    seed: int = 42
    images_per_prompt: int = 1
    image_guidance_scale: float | None = None  # of an edit's picture, apart from its text
    skip: guidance.SkipLayer | None = None
    skip_forgets_reference: bool = False  # as the released code does, by mistake
    three_axis_rope: bool = False  # of a picture shown to the language model; see `metaquery`
    newline_after_picture: bool = False  # in the language model's prompt; the same
    dtype: jnp.dtype = jnp.float32  # of the text encoders and the transformer
    vae_dtype: jnp.dtype = jnp.float32
    progress: bool = False

    def __post_init__(self):
        if self.skip and self.image_guidance_scale is not None:
            raise InputError("skip-layer guidance and image guidance are one or the other")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures float32 [B, H, W, 3] in [0, 1], and the latents [B, h, w, C] they come from."""

    pictures: np.ndarray
    latents: np.ndarray


class Conditions(NamedTuple):
    """What pictures are drawn under: {"context", "pooled"} and, for edits, "reference"
    [B, h, w, C]; a leading axis of all pictures."""

    positive: dict
    negative: dict | None  # None where guidance is off
    blank: dict | None = None  # the negative one without the picture, where its guidance is on


def open_model(
    folder: Path, mllm: Path | None = None, conditioner: Path | None = None, *, keep: bool = False
) -> Parts:
    """The parts that Kontext needs or, with the language model's folder `mllm`, MetaQuery; their
    parameters kept in memory between calls or not.

    `conditioner` is its folder or one that holds it, as the model's may. Raises InputError where
    a part is missing, is not supported or does not fit the others.
    """
    if mllm is None:
        if conditioner:
            raise InputError(f"the conditioner {conditioner} needs a language model; give --mllm")
        if config_file(folder / "conditioner") and not config_file(folder / kontext.CLIP[0]):
            raise InputError(f"{folder} is a MetaQuery model; give its language model by --mllm")
        return Parts(folder, (*REQUIRED, *kontext.CLIP), optional=(kontext.T5,), keep=keep)
    conditioner = conditioner or folder
    if not config_file(conditioner):
        conditioner /= "conditioner"
    parts = Parts(folder, REQUIRED, elsewhere={"mllm": mllm, "conditioner": conditioner},
                  keep=keep)
    metaquery.check(parts)
    return parts


def size_multiple(parts: Parts) -> int:
    """What the sides of a picture must be multiples of: a latent patch, in pixels."""
    return parts["vae"].config.factor * parts["transformer"].config.patch_size


def generate(
    parts: Parts, prompts: list[str], negative_prompt: str = "", *,
    height: int = 512, width: int = 384, latents: np.ndarray | None = None,
    options: Options = Options(),
) -> Drawn:
    """`images_per_prompt` pictures for each prompt, a prompt's pictures one after the other.

    height, width: pixels, multiples of `size_multiple`; latents: the standard normal to begin
    with, [B, h, w, C], drawn from the seed by default. Raises InputError for sizes or latents
    that do not fit.
    """
    images.check_size("height", height, size_multiple(parts))
    images.check_size("width", width, size_multiple(parts))
    shape = latent_shape(parts, len(prompts) * options.images_per_prompt, height, width)
    latents = initial_latents(shape, options.seed, latents)
    return draw(parts, latents, encode_prompts(parts, prompts, negative_prompt, options), options)


def latent_shape(parts: Parts, batch: int, height: int, width: int) -> tuple[int, ...]:
    """[B, h, w, C] of a picture's latents; InputError where it is too large for the positions."""
    cfg, factor = parts["transformer"].config, parts["vae"].config.factor
    if max(height, width) // factor > cfg.max_side:
        raise InputError(f"a picture of {height}x{width} is too large; this model's positions "
                         f"reach to {cfg.max_side * factor} pixels a side")
    return batch, height // factor, width // factor, cfg.in_channels


def initial_latents(shape: tuple[int, ...], seed: int, given: np.ndarray | None) -> jax.Array:
    """Standard normal [B, h, w, C], each sample keyed by its index; or the given one, checked."""
    if given is not None:
        if given.shape != shape:
            raise InputError(f"latents of shape {_chw(given.shape)} are given where "
                             f"{_chw(shape)} is needed (channels first)")
        return jnp.asarray(given, jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(shape[0]))
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)


def _chw(shape):
    return [shape[0], shape[-1], *shape[1:-1]] if len(shape) == 4 else list(shape)


def encode_prompts(
    parts: Parts, prompts: list[str], negative_prompt: str, options: Options,
    pictures: Sequence[Image.Image] | None = None,
) -> Conditions:
    """The conditions of prompts, and of the picture that each one edits, in the order of the
    pictures drawn. In the blank ones a language model sees a black picture, as in MetaQuery."""
    if pictures is not None and options.image_guidance_scale is not None:
        kinds = 3
    else:
        kinds = 2 if options.guidance_scale > 1 else 1
    if pictures is None or "conditioner" not in parts:  # Kontext's encoders see no pictures
        shown = [[None] * len(prompts), [None], [None]][:kinds]
    else:
        shown = [pictures, pictures, [Image.new("RGB", pictures[0].size)]][:kinds]
    texts = [*prompts, *[negative_prompt] * sum(map(len, shown[1:]))]
    if "conditioner" in parts:
        encoded = metaquery.encode(
            parts, texts, pictures and [p for kind in shown for p in kind], options.dtype,
            three_axis_rope=options.three_axis_rope, newline=options.newline_after_picture)
    else:
        names = [n for n in kontext.LENGTHS if n in parts]
        ids = {n: kontext.tokenize(parts.folder, n, texts) for n in names}
        encoded = kontext.encode(parts, lambda n: parts.load(n, options.dtype), ids, options.dtype)
    conditions, total = [], len(prompts) * options.images_per_prompt
    for kind in shown:
        conditions.append({k: jnp.repeat(a[:len(kind)], total // len(kind), 0)
                           for k, a in encoded.items()})
        encoded = {k: a[len(kind):] for k, a in encoded.items()}
    return Conditions(*conditions, *[None] * (3 - kinds))


def draw(parts: Parts, latents: jax.Array, conditions: Conditions, options: Options) -> Drawn:
    """Denoise under the conditions, and decode."""
    cfg = parts["transformer"].config
    layers = options.skip.layers if options.skip else ()
    if outside := [i for i in layers if not 0 <= i < cfg.num_layers]:
        raise InputError(f"skip layer {outside[0]} is not one of the transformer's "
                         f"{cfg.num_layers} (0 to {cfg.num_layers - 1})")
    params = parts.load("transformer", options.dtype)
    denoised = _denoise(cfg, params, parts["scheduler"].config, latents, conditions, options)
    del params
    vae = parts["vae"].config
    pictures = _decode(vae, parts.load("vae", options.vae_dtype),
                       denoised.astype(options.vae_dtype))
    return Drawn(np.asarray(pictures), np.asarray(denoised))


def _denoise(cfg, params, timing, x, conditions, options):
    sigmas = schedule.sigmas(timing, options.steps)
    run = functools.partial(
        denoise, cfg, params, **conditions._asdict(), scale=options.guidance_scale,
        image_scale=options.image_guidance_scale, steps=options.steps, skip=options.skip,
        skip_forgets_reference=options.skip_forgets_reference, dtype=options.dtype,
        timesteps=timing.num_train_timesteps)
    if not options.progress:
        return run(x, sigmas=sigmas, first=0)
    # A display needs the host between steps; the program is then a scan of one step, which
    # serves any number of them. Placed as its result will be, or the second would compile anew.
    x = jax.device_put(x, jax.devices()[0])
    for i in tqdm(range(options.steps), desc="denoise", unit="step"):
        x = jax.block_until_ready(run(x, sigmas=sigmas[i:i + 2], first=i))
    return x


@functools.partial(jax.jit, static_argnames=(
    "cfg", "skip", "skip_forgets_reference", "dtype", "timesteps"))
def denoise(
    cfg: mmdit.Config, params: Tree, x: jax.Array, *, sigmas: jax.Array, first: int,
    positive: dict, negative: dict | None, scale: float, steps: int, blank: dict | None = None,
    image_scale: float | None = None, skip: guidance.SkipLayer | None = None,
    skip_forgets_reference: bool = False, dtype=jnp.float32, timesteps: int = 1000,
) -> jax.Array:
    """x [B, h, w, C] from noise level sigmas[0] to sigmas[-1], guided where `negative` is given,
    and by the picture apart from the text where `blank` is (`Conditions`).

    `first` is the index of the first of these steps among all `steps`.
    """

    def velocity(x, sigma, condition, **kw):
        timestep = jnp.broadcast_to(sigma * timesteps, x.shape[:1])
        return mmdit.apply(cfg, params, x, timestep, **condition, dtype=dtype, **kw)

    def skipping(x, sigma, condition):
        if skip_forgets_reference:
            condition = {k: v for k, v in condition.items() if k != "reference"}
        return velocity(x, sigma, condition, skip_layers=skip.layers)

    if negative is None:
        guided = guidance.conditional(velocity, positive)
    elif blank is not None:
        guided = guidance.three_way(velocity, positive, negative, blank, scale, image_scale)
    elif skip:
        guided = guidance.skip_layer(velocity, skipping, positive, negative, scale, skip, steps)
    else:
        guided = guidance.classifier_free(velocity, positive, negative, scale)
    return sample(guided, x, sigmas, first)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _decode(cfg, params, latents):
    """The transformer's latents -> pictures float32 in [0, 1], one at a time for the memory."""

    def one(z):
        x = autoencoder.decode(cfg, params, autoencoder.unscale(cfg, z[None]))[0]
        return jnp.clip(x.astype(jnp.float32) * 0.5 + 0.5, 0, 1)

    return lax.map(one, latents)
