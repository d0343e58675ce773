"""What each stage minimizes, a loss a sample.

Every objective is a function of (parameters by part, batch, keys [B]) that returns the loss of
each sample [B] and other figures of each sample by name. Batches are those of `train.collate`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from unipic_jax.conditioning import judging, kontext, metaquery, qwen_chat
from unipic_jax.core import ops
from unipic_jax.core.params import Tree
from unipic_jax.flow import schedule
from unipic_jax.flow.loss import velocity_loss
from unipic_jax.model import Part
from unipic_jax.models import autoencoder, mmdit
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language

# Of the autoencoder's divergence beside its error, each a sum over a picture. Latent diffusion
# (G.1) has 1e-6 and divides the latents by their deviation afterwards; this is enough to keep that
# near 1, and leaves posteriors of a tenth of it.
KL_WEIGHT = 3e-4


def velocity(
    parts: Mapping[str, Part], params: Tree, batch: dict, keys: jax.Array, *, dtype, remat: str
):
    """The velocity loss of "target" uint8 [B, H, W, 3] under "prompt" and, for edits, "source".

    The autoencoder's posteriors are sampled anew each time. Also gives "sigma", the noise levels.
    """
    target, source, level, noise = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 4))(keys),
                                                0, 1)
    vae, cfg = parts["vae"].config, parts["transformer"].config
    keyed = {"target": target} | ({"source": source} if "source" in batch else {})
    drawn = latents(vae, params["vae"], batch, keyed, dtype)
    x0 = drawn["target"]
    condition = conditions(parts, params, batch["prompt"], dtype=dtype, remat=remat)
    if "source" in drawn:
        condition["reference"] = drawn["source"]
    timing = parts["scheduler"].config
    sigma = schedule.draw(timing, level)

    def f(x, sigma):
        timestep = sigma * timing.num_train_timesteps
        return mmdit.apply(cfg, params["transformer"], x, timestep, **condition, remat=remat,
                           dtype=dtype)

    loss = velocity_loss(f, x0, normal(noise, x0.shape[1:]), sigma)
    return loss, {"sigma": sigma}


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], a sample a key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def to_unit(pictures: jax.Array, dtype) -> jax.Array:
    """uint8 in [0, 255] to [-1, 1]."""
    return (pictures.astype(jnp.float32) / 127.5 - 1).astype(dtype)


def latents(
    cfg: autoencoder.Config, params: Tree, batch: dict, keys: Mapping[str, jax.Array], dtype
) -> dict[str, jax.Array]:
    """A sample of the scaled latents float32 [B, h, w, C] by each name in `keys`: of the pictures
    uint8 [B, H, W, 3] of that name, or of the posteriors' cached moments."""
    cached = {n: batch[f"{n}_moments"] for n in keys if f"{n}_moments" in batch}
    moments = {n: jnp.split(m.astype(jnp.float32), 2, -1) for n, m in cached.items()}
    if names := [n for n in keys if n not in cached]:
        # All in one: a TPU's compiler takes minutes over each time that the encoder stands there.
        x = jnp.stack([batch[n] for n in names], 1)  # [B, n, H, W, 3]
        x = ops.reshape(x, x.shape[0] * x.shape[1], *x.shape[2:])
        posterior = autoencoder.encode(cfg, params, to_unit(x, dtype))
        mean, logvar = (ops.reshape(a.astype(jnp.float32), -1, len(names), *a.shape[1:])
                        for a in (posterior.mean, posterior.logvar))
        moments |= {n: (mean[:, i], logvar[:, i]) for i, n in enumerate(names)}

    def sample(name):
        mean, logvar = moments[name]
        return autoencoder.Posterior(mean, logvar).sample(normal(keys[name], mean.shape[1:]))

    return {n: jax.lax.stop_gradient(autoencoder.scale(cfg, sample(n))) for n in keys}


def conditions(
    parts: Mapping[str, Part], params: Tree, prompt: dict, *, dtype, remat: str = "none"
) -> dict[str, jax.Array]:
    """The transformer's conditions from a collated prompt: MetaQuery's where there is a
    conditioner, else Kontext's; or as they were cached."""
    if "context" in prompt:
        return {k: a.astype(dtype) for k, a in prompt.items()}
    if "conditioner" not in parts:
        return kontext.encode(parts, params.__getitem__, prompt, dtype)
    return metaquery.apply(parts["mllm"].config, parts["conditioner"].config, params["mllm"],
                           params["conditioner"], chat_inputs(prompt), dtype=dtype, remat=remat)


def chat_inputs(prompt: dict) -> metaquery.Inputs:
    """A collated chat as `metaquery.Inputs`, whose positions have their axes first."""
    pictures = prompt.get("pictures")
    return metaquery.Inputs(prompt["ids"], prompt["mask"], prompt["positions"].swapaxes(0, 1),
                            pictures and qwen.vision.Pictures(**pictures))


def answer(
    parts: Mapping[str, Part], params: Tree, batch: dict, keys: jax.Array, *, dtype, remat: str,
    blank: float = 0.0,
):
    """The cross-entropy of "answers" (bool [B, S]: the tokens to be said) in the collated chat
    "prompt", and "accuracy": 1 where the likeliest token is right at every one of them.

    In a share `blank` of the chats what has been said so far is not shown (word dropout at its
    fullest, arXiv:1511.06349): each token of an answer is found from its place alone, side by side
    with the others, which is how MetaQuery's queries read a prompt.
    """
    cfg, inputs = parts["mllm"].config, chat_inputs(batch["prompt"])
    x = qwen.embed(cfg, params["mllm"], inputs.ids, inputs.pictures, dtype)
    if blank:
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, blank))(keys)
        x = jnp.where((drop[:, None] & batch["answers"])[..., None], 0, x)
    states, _ = language.apply(cfg, params["mllm"], x, inputs.positions, inputs.mask, remat=remat)
    logits = language.logits(cfg, params["mllm"], states[:, :-1]).astype(jnp.float32)
    said, tokens = batch["answers"][:, 1:], inputs.ids[:, 1:]
    # A sum in place of a look-up, since the vocabulary may be split over devices.
    own = jnp.where(tokens[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    each = jax.nn.logsumexp(logits, -1) - own
    wrong = said & (own < logits.max(-1))
    loss = jnp.where(said, each, 0).sum(-1) / jnp.maximum(said.sum(-1), 1)
    return loss, {"accuracy": 1.0 - wrong.any(-1)}


def judgement(
    parts: Mapping[str, Part], params: Tree, batch: dict, keys: jax.Array, *, dtype, remat: str
):
    """The squared error of the judge's "score" float32 [B] of "source" edited to "target"; also
    the "score" that it gives, and the error's size, "absolute"."""
    score = judge(parts["mllm"], parts["judge"], params["mllm"], params["judge"], batch["judge"],
                  *(batch[n].astype(jnp.float32) / 255 for n in ("source", "target")),
                  dtype=dtype, remat=remat)
    error = score - batch["score"]
    return jnp.square(error), {"score": score, "absolute": jnp.abs(error)}


def judge(
    mllm: Part, head: Part, mllm_params: Tree, params: Tree, asked: dict, before: jax.Array,
    after: jax.Array, *, dtype, remat: str = "none",
) -> jax.Array:
    """The scores float32 [B] that a judge gives to edits, by a collated chat and pictures
    [B, H, W, 3] in [0, 1]."""
    return judging.apply(qwen_chat.open_chat(mllm.folder).images, mllm.config, head.config,
                         mllm_params, params, judging.Inputs(**asked), before, after, dtype=dtype,
                         remat=remat)


def reconstruction(
    parts: Mapping[str, Part], params: Tree, batch: dict, keys: jax.Array, *, dtype, remat: str
):
    """Mean absolute and squared error of the autoencoder on "target", and its divergence from the
    standard normal; also the error alone, "absolute"."""
    cfg = parts["vae"].config
    x = to_unit(batch["target"], dtype)
    posterior = autoencoder.encode(cfg, params["vae"], x)
    mean, logvar = (a.astype(jnp.float32) for a in (posterior.mean, posterior.logvar))
    z = autoencoder.Posterior(mean, logvar).sample(normal(keys, mean.shape[1:]))
    out = autoencoder.decode(cfg, params["vae"], z.astype(dtype)).astype(jnp.float32)
    error = out - x.astype(jnp.float32)
    absolute, squared = (a.mean((1, 2, 3)) for a in (jnp.abs(error), jnp.square(error)))
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3))
    return absolute + squared + KL_WEIGHT / x[0].size * divergence, {"absolute": absolute}


OBJECTIVES = {"velocity": velocity, "answer": answer, "reconstruction": reconstruction,
              "judgement": judgement}
