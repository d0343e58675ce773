"""Pictures and questions in, text out: Qwen2.5-VL's answers, token by token."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unipic_jax.conditioning import qwen_chat
from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.model import Part, read_part
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import language, rope

CHUNK = 4  # tokens between two calls of `show`


@dataclasses.dataclass(frozen=True)
class Options:
    """How text is made; by default the likeliest token each time."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # in (0, 1]
    repetition_penalty: float | None = None  # by default that of the folder's generation_config
    seed: int = 42
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"max new tokens {self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} must lie above 0 and not above 1")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise InputError(f"repetition penalty {self.repetition_penalty} must be positive")


@dataclasses.dataclass(frozen=True)
class Answer:
    """New token ids, the end token among them where there is one, and what they say."""

    tokens: list[int]
    text: str


class Sampling(NamedTuple):
    """`Options` as arrays."""

    temperature: jax.Array | float
    top_p: jax.Array | float
    repetition_penalty: jax.Array | float
    key: jax.Array
    ends: jax.Array | np.ndarray  # int32 [E]: a row that has one is done


class State(NamedTuple):
    """Answers in the making."""

    tokens: jax.Array  # int32 [B, N]; past a row's end they mean nothing
    count: jax.Array  # of the tokens that are there
    done: jax.Array  # bool [B]
    seen: jax.Array  # bool [B, V]: the tokens of the prompt and the answer
    first: jax.Array  # int32 [B]: the position of the first new token
    mask: jax.Array  # bool [B, S + N]
    cache: Tree


def open_model(folder: Path) -> Part:
    """The part in `folder`; InputError where it is not a Qwen2.5-VL."""
    part = read_part(folder)
    if part.module is not qwen:
        raise InputError(f"{folder} is not a Qwen2.5-VL")
    return part


def describe(
    chat: qwen_chat.Chat, cfg: qwen.Config, params: Tree,
    conversations: Sequence[qwen_chat.Conversation], options: Options = Options(),
    show: Callable[[list[Answer]], None] | None = None,
) -> list[Answer]:
    """The next message of each conversation, all as one batch.

    `show` is called with the answers so far: after the prompts, then every few tokens. Without it
    the device makes all tokens in one call.
    """
    prompts = qwen_chat.read(chat, cfg, conversations)
    positions, delta = rope.picture_positions(cfg, prompts.ids, prompts.grids, prompts.mask)
    penalty = options.repetition_penalty
    sampling = Sampling(options.temperature, options.top_p,
                        chat.repetition_penalty if penalty is None else penalty,
                        jax.random.key(options.seed), np.array(chat.ends, np.int32))
    N = options.max_new_tokens
    state = prefill(cfg, params, prompts.ids, prompts.mask, positions, delta, prompts.pictures,
                    sampling, new_tokens=N, dtype=options.dtype)
    until = N if show is None else 1  # to 1 is no step: the program is compiled before the display
    while True:
        state = decode(cfg, params, state, sampling, until)
        tokens, done = jax.device_get((state.tokens, state.done))
        count = int(state.count)
        answers = [_answer(chat, row[:count]) for row in tokens]
        if show is not None:
            show(answers)
        if count == N or done.all():
            return answers
        until = min(count + CHUNK, N)


def _answer(chat, tokens) -> Answer:
    ends = np.flatnonzero(np.isin(tokens, chat.ends))
    tokens = tokens[:ends[0] + 1 if len(ends) else None].tolist()
    return Answer(tokens, chat.tokenizer.decode(tokens, skip_special_tokens=True,
                                                clean_up_tokenization_spaces=False))


@functools.partial(jax.jit, static_argnames=("cfg", "new_tokens", "dtype"))
def prefill(
    cfg: qwen.Config, params: Tree, ids: jax.Array, mask: jax.Array, positions: jax.Array,
    delta: jax.Array, pictures: qwen.vision.Pictures | None, sampling: Sampling, *,
    new_tokens: int, dtype=jnp.float32,
) -> State:
    """Prompts [B, S], padded on the right, with positions and delta as `rope.picture_positions`
    has them -> the state with the first token, and a cache that `new_tokens` fit in."""
    B, S = ids.shape
    length = mask.sum(-1)
    x = qwen.embed(cfg, params, ids, pictures, dtype)
    cache = language.new_cache(cfg, x, S + new_tokens)
    longer = jnp.pad(mask, ((0, 0), (0, new_tokens)), constant_values=True)
    states, cache = language.apply(cfg, params, x, positions, longer, cache)
    states = jnp.take_along_axis(states, (length - 1)[:, None, None], 1)[:, 0]  # [B, D]
    # A token that is padding somewhere counts where it is not.
    seen = jnp.zeros((B, cfg.vocab_size), bool).at[jnp.arange(B)[:, None], ids].max(mask)
    state = State(jnp.zeros((B, new_tokens), jnp.int32), jnp.int32(0), jnp.zeros(B, bool), seen,
                  length + delta, longer, cache)
    return _append(sampling, state, language.logits(cfg, params, states))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode(
    cfg: qwen.Config, params: Tree, state: State, sampling: Sampling, until: int | jax.Array
) -> State:
    """The state with `until` tokens, or with fewer where all rows are done before."""

    def step(state: State) -> State:
        before = state.count - 1  # new tokens before the last one
        token = lax.dynamic_slice_in_dim(state.tokens, before, 1, 1)  # [B, 1]
        x = qwen.embed(cfg, params, token, dtype=state.cache["k"].dtype)
        positions = jnp.broadcast_to(state.first[:, None] + before, (3, *token.shape))
        states, cache = language.apply(cfg, params, x, positions, state.mask, state.cache)
        return _append(sampling, state._replace(cache=cache),
                       language.logits(cfg, params, states[:, 0]))

    return lax.while_loop(lambda s: (s.count < until) & ~s.done.all(), step, state)


def _append(sampling: Sampling, state: State, logits: jax.Array) -> State:
    """The state with the token after these logits [B, V]."""
    rows, logits = jnp.arange(len(logits)), meshes.whole_rows(logits)
    token = choose(sampling, logits, state.seen, jax.random.fold_in(sampling.key, state.count))
    return state._replace(
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, 1),
        count=state.count + 1, done=state.done | (token[:, None] == sampling.ends).any(-1),
        seen=state.seen.at[rows, token].set(True))


def choose(sampling: Sampling, logits: jax.Array, seen: jax.Array, key: jax.Array) -> jax.Array:
    """The next token [B] after logits [B, V]; a row's draw depends on the key and its index."""
    logits = penalize(logits.astype(jnp.float32), seen, sampling.repetition_penalty)

    def draw():
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
        likely = nucleus(logits / sampling.temperature, sampling.top_p)
        return jax.vmap(jax.random.categorical)(keys, likely)

    token = lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits, -1))
    return token.astype(jnp.int32)


def penalize(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Logits [B, V] with those of the tokens in `seen` [B, V] divided by the penalty, or
    multiplied where they are negative (CTRL, Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def nucleus(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Logits [B, V], those outside the fewest tokens whose probabilities come to `top_p` at -inf
    (Holtzman et al. 2020)."""
    ascending = jnp.sort(logits, -1)
    left_out = jnp.cumsum(jax.nn.softmax(ascending, -1), -1) <= 1 - top_p
    first = jnp.minimum(left_out.sum(-1, keepdims=True), logits.shape[-1] - 1)
    return jnp.where(logits < jnp.take_along_axis(ascending, first, -1), -jnp.inf, logits)
