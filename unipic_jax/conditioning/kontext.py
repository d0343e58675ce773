"""Kontext's text conditioning: two CLIP encoders and T5, as Stable Diffusion 3 joins them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unipic_jax.conditioning.tokenizers import open_tokenizer
from unipic_jax.core.params import Tree
from unipic_jax.model import Part
from unipic_jax.models import clip_text, t5_encoder

LENGTHS = {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}
"""The encoders by the name of their part, and the tokens that each one takes at most."""
CLIP, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"


def tokenize(folder: Path, encoder: str, prompts: list[str]) -> np.ndarray:
    """Token ids int32 [B, S] for an encoder of a model folder, padded and truncated to what the
    encoder takes, or to the tokenizer's own limit where that is less.

    Raises InputError where its tokenizer is missing or cannot be opened.
    """
    tokenizer = open_tokenizer(folder / encoder.replace("text_encoder", "tokenizer"))
    length = min(LENGTHS[encoder], tokenizer.model_max_length)
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                    return_tensors="np").input_ids
    return ids.astype(np.int32)


_clip = jax.jit(clip_text.apply, static_argnames=("cfg", "dtype"))
_t5 = jax.jit(t5_encoder.apply, static_argnames=("cfg", "dtype"))


def encode(
    parts: Mapping[str, Part], load: Callable[[str], Tree], ids: Mapping[str, np.ndarray], dtype
) -> dict[str, jax.Array]:
    """Token ids by encoder -> {"context": [B, S_clip + S_t5, D], "pooled": [B, D_pooled]}.

    `load` gives the parameters of an encoder; each is let go before the next is loaded. Without
    T5 its place is as many zeros as CLIP has tokens, as in the release.
    """
    states, pooled = zip(*(_clip(parts[n].config, load(n), ids[n], dtype) for n in CLIP))
    if T5 in parts:
        t5 = _t5(parts[T5].config, load(T5), ids[T5], dtype)
    else:
        width = parts["transformer"].config.joint_attention_dim
        t5 = jnp.zeros((*ids[CLIP[0]].shape, width), dtype)
    return _join(states, pooled, t5)


@jax.jit
def _join(states, pooled, t5):
    """CLIP states side by side, padded to T5's width, then T5's tokens after them."""
    clip = jnp.concatenate(states, -1)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return {"context": jnp.concatenate([clip, t5], 1), "pooled": jnp.concatenate(pooled, -1)}
