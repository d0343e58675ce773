"""Chats as Qwen2.5-VL takes them: its chat template, token ids, and the pictures among them.

A conversation is a list of messages {"role", "content"}, as transformers has them; the content is
a text, or a list of {"type": "text", "text"} and {"type": "image", "image": a PIL picture}.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipic_jax.conditioning import qwen_images
from unipic_jax.conditioning.tokenizers import open_tokenizer
from unipic_jax.core.config import read_json
from unipic_jax.core.errors import InputError
from unipic_jax.models.qwen2_5_vl import Config, vision

SYSTEM_PROMPT = ("{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
                 "You are a helpful assistant.<|im_end|>\n{% endif %}")
"""What the template of Qwen2.5-VL says first where nobody else does; UniPic 2.0 takes it out."""

TOKENS = 64  # prompts are padded to multiples of this

Conversation = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Chat:
    """What turns conversations into arrays, and when and how their answers end."""

    tokenizer: Any
    template: str
    images: qwen_images.Config
    ends: tuple[int, ...]  # the tokens that end an answer
    repetition_penalty: float


class Prompts(NamedTuple):
    """Conversations as arrays, padded on the right."""

    ids: np.ndarray  # int32 [B, S]
    mask: np.ndarray  # bool [B, S]: what is not padding
    grids: list[np.ndarray]  # of each row's pictures: int [m, 3], frames, rows, columns of patches
    pictures: vision.Pictures | None  # None where no row has any


@functools.lru_cache(maxsize=4)
def open_chat(folder: Path) -> Chat:
    """The tokenizer, the chat template and the image processor of a Qwen2.5-VL folder.

    Raises InputError where one is missing or is not Qwen2.5-VL's.
    """
    folder = Path(folder)
    template, where = _read_template(folder)
    chat = Chat(open_tokenizer(folder), template.replace(SYSTEM_PROMPT, ""),
                qwen_images.read_config(folder), *_read_generation(folder))
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
             {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    want = ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\n")
    try:
        known = SYSTEM_PROMPT in template and render(chat, probe) == want
    except Exception:  # the template's own errors, of many kinds
        known = False
    if not known:
        raise InputError(f"{where} is not the chat template of Qwen2.5-VL; take the release's own")
    return chat


def _read_template(folder: Path) -> tuple[str, Path]:
    """The chat template, and the file that has it: each generation of transformers has its own."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8"), file
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        raw = read_json(file) if file.is_file() else None
        if isinstance(raw, dict) and isinstance(raw.get("chat_template"), str):
            return raw["chat_template"], file
    raise InputError(f"{folder} has no chat template (no chat_template.jinja or .json)")


def _read_generation(folder: Path) -> tuple[tuple[int, ...], float]:
    """The end tokens and the repetition penalty of generation_config.json, or of config.json."""
    files = [folder / name for name in ("generation_config.json", "config.json")]
    raw = [read_json(file) for file in files if file.is_file()]
    raw += [r["text_config"] for r in raw if "text_config" in r]
    ends = next((r["eos_token_id"] for r in raw if r.get("eos_token_id") is not None), [])
    penalty = next((r["repetition_penalty"] for r in raw if r.get("repetition_penalty")), 1.0)
    return tuple(np.atleast_1d(np.array(ends, int)).tolist()), float(penalty)


def limited(chat: Chat, pixels: int) -> Chat:
    """The chat with pictures shrunk to at most so many pixels; InputError for less than it may."""
    if pixels < chat.images.min_pixels:
        raise InputError(f"--max-pixels must be at least {chat.images.min_pixels}")
    return dataclasses.replace(chat, images=dataclasses.replace(chat.images, max_pixels=pixels))


def render(chat: Chat, conversation: Conversation) -> str:
    """The text of a conversation, up to where the next answer begins; one `<|image_pad|>` stands
    for each picture."""
    return chat.tokenizer.apply_chat_template(
        [m | {"content": _without_pictures(m["content"])} for m in conversation],
        chat_template=chat.template, add_generation_prompt=True, tokenize=False)


def _without_pictures(content):
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def read(
    chat: Chat, cfg: Config, conversations: Sequence[Conversation],
    images: qwen_images.Config | None = None, length: int | None = None,
) -> Prompts:
    """Conversations -> `Prompts`, in one of few shapes, so that few programs are compiled.

    `images` is what the pictures are prepared by, in place of the chat's own; `length` is S, by
    default what the longest needs. Raises InputError where a text itself has `<|image_pad|>`, for
    a picture that is too narrow, or for a conversation that is longer than `length`.
    """
    rows, ids = [], []
    for conversation in conversations:
        pictures = [part["image"] for m in conversation if not isinstance(m["content"], str)
                    for part in m["content"] if part["type"] == "image"]
        patches, grid = qwen_images.preprocess(images or chat.images, pictures)
        rows.append((patches, grid))
        row = np.array(chat.tokenizer(render(chat, conversation)).input_ids, np.int32)
        is_image = row == cfg.image_token_id
        if is_image.sum() != len(grid):
            raise InputError(f"a prompt of {len(grid)} pictures has {is_image.sum()} image tokens; "
                             "leave <|image_pad|> out of the text")
        counts = np.ones(len(row), int)
        counts[is_image] = grid.prod(1) // cfg.vision.spatial_merge_size**2
        ids.append(np.repeat(row, counts))
    longest = max(map(len, ids))
    if length is not None and longest > length:
        raise InputError(f"a conversation has {longest} tokens, more than {length}")
    S = length or bucket(longest, TOKENS)
    mask = np.arange(S) < np.array([len(row) for row in ids])[:, None]
    ids = np.stack([np.pad(row, (0, S - len(row))) for row in ids])
    grids = [grid for _, grid in rows]
    if not any(map(len, grids)):
        return Prompts(ids, mask, grids, None)
    windows = bucket(max(vision.count_windows(cfg.vision, grid) for grid in grids))
    return Prompts(ids, mask, grids, vision.pack(cfg.vision, rows, windows))


def bucket(n: int, unit: int = 1) -> int:
    """n rounded up to a multiple of `unit`, and past 8 of them to one of four sizes an octave."""
    n = -(-n // unit)
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-n // step) * step * unit
