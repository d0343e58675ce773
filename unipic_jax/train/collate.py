"""Examples to the arrays of a batch, on the host; every array has a leading axis of samples.

A batch is {"target": uint8 [B, H, W, 3], "source": the same (edits), "prompt": ...} or, for
questions, {"prompt": ..., "answers": bool [B, S]}; or, for scored edits, pictures, {"judge": the
fields of `judging.Inputs`, "score": float32 [B]}. A prompt is token ids by text encoder, or a
chat: {"ids" [B, S], "mask" [B, S + Q], "positions" [B, 3, S + Q], "pictures": the fields of
`vision.Pictures`}. With caches (`train.cache`) there are also "target_moments" and
"source_moments" [B, h, w, 2C], and a prompt may be the conditions themselves.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unipic_jax.conditioning import judging, qwen_chat
from unipic_jax.conditioning import kontext as clips
from unipic_jax.conditioning import metaquery as queries
from unipic_jax.core.errors import InputError
from unipic_jax.data.records import Example
from unipic_jax.models import qwen2_5_vl as qwen
from unipic_jax.models.qwen2_5_vl import rope

Examples = Sequence[Example]
Collate = Callable[[Examples], dict]
"""Examples of one task and size -> the arrays of a batch."""


def pictures(examples: Examples, *, reference: bool = True) -> dict:
    """The pictures alone; the source only where it is to be the transformer's reference."""
    batch = {}
    if examples[0].target is not None:
        batch["target"] = np.stack([e.target for e in examples])
    if examples[0].source is not None and reference:
        batch["source"] = np.stack([e.source for e in examples])
    return batch


@dataclasses.dataclass(frozen=True)
class Kontext:
    """Prompts for the text encoders of a model folder."""

    folder: Path
    encoders: tuple[str, ...]

    def __call__(self, examples: Examples) -> dict:
        texts = [e.text for e in examples]
        return pictures(examples) | {
            "prompt": {n: clips.tokenize(self.folder, n, texts) for n in self.encoders}}


@dataclasses.dataclass(frozen=True)
class MetaQuery:
    """Prompts for a language model with queries after them.

    Texts are cut to `text_tokens`, so that all batches of one size of picture have one shape.
    """

    mllm: Path
    cfg: qwen.Config
    num_queries: int
    text_tokens: int
    source_to: tuple[str, ...]  # who sees the picture of an edit: "mllm", "transformer"
    three_axis_rope: bool
    newline: bool

    def __call__(self, examples: Examples) -> dict:
        chat = qwen_chat.open_chat(self.mllm)
        shown = None
        if examples[0].source is not None and "mllm" in self.source_to:
            shown = [Image.fromarray(e.source) for e in examples]
        texts = [_cut(chat, e.text, self.text_tokens) for e in examples]
        style = dict(three_axis_rope=self.three_axis_rope, newline=self.newline)
        bare = queries.prepare(chat, self.cfg, 0, [""], shown and shown[:1], **style)
        inputs = queries.prepare(chat, self.cfg, self.num_queries, texts, shown, **style,
                                 length=int(bare.mask.sum()) + self.text_tokens)
        seen = pictures(examples, reference="transformer" in self.source_to)
        return seen | {"prompt": _chat(inputs)}


@dataclasses.dataclass(frozen=True)
class Answers:
    """Questions about pictures with their answers; or prompts to draw from, as MetaQuery puts
    them, with descriptions.

    A chat has `text_tokens` of text: its first question is cut so that the answer fits, an answer
    of more raises InputError, and of the turns after it there are as many as fit.
    """

    mllm: Path
    cfg: qwen.Config
    text_tokens: int

    def __call__(self, examples: Examples) -> dict:
        chat = qwen_chat.open_chat(self.mllm)
        end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
        said = [[*chat.tokenizer(e.answer).input_ids, end] for e in examples]  # first answers
        for example, tokens in zip(examples, said):
            if len(tokens) > self.text_tokens + 1:
                raise InputError(f"{example.name}: its answer has {len(tokens) - 1} tokens, more "
                                 f"than {self.text_tokens}")
        chats = [queries.conversation(_cut(chat, e.text, self.text_tokens + 1 - len(tokens)),
                                      None if e.source is None else Image.fromarray(e.source))
                 for e, tokens in zip(examples, said)]
        shape = next(p for p in (examples[0].source, examples[0].target) if p is not None).shape
        longest = queries.conversation("", Image.fromarray(np.zeros(shape, np.uint8)))
        length = int(qwen_chat.read(chat, self.cfg, [longest]).mask.sum()) + self.text_tokens
        # With a last row that has a picture, the shapes are the same where no other has one.
        asked = qwen_chat.read(chat, self.cfg, [*chats, longest], length=length)
        asked = asked._replace(
            ids=asked.ids[:-1], mask=asked.mask[:-1], grids=asked.grids[:-1],
            pictures=qwen.vision.Pictures(*(rows[:-1] for rows in asked.pictures)))
        ids, mask = (np.pad(a, ((0, 0), (0, 1))) for a in (asked.ids, asked.mask))
        answers = np.zeros_like(mask)
        for row, tokens in enumerate(said):
            begin = asked.mask[row].sum()
            for question, answer in [([], tokens), *_turns(chat, examples[row].turns, end)]:
                middle = begin + len(question)
                if middle + len(answer) > length + 1:
                    break
                ids[row, begin:middle + len(answer)] = [*question, *answer]
                answers[row, middle:middle + len(answer)] = True
                begin = middle + len(answer)
            mask[row, :begin] = True
        positions, _ = rope.picture_positions(self.cfg, ids, asked.grids, mask)
        to_draw = np.array([e.target is not None for e in examples])
        if to_draw.any():
            positions[:, to_draw] = rope.text_positions(mask[to_draw])
        inputs = queries.Inputs(ids, mask, positions, asked.pictures)
        return {"prompt": _chat(inputs), "answers": answers}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Edits with a score, which is the text of their answer; a text that is no number raises
    InputError."""

    mllm: Path
    cfg: qwen.Config
    text_tokens: int

    def __call__(self, examples: Examples) -> dict:
        if any(e.source is None or e.target is None for e in examples):
            raise InputError("a judge learns from edits with their score as the answer; these "
                             "examples lack a picture")
        chat, size = qwen_chat.open_chat(self.mllm), examples[0].target.shape[1::-1]
        asked = judging.prepare(chat, self.cfg, [e.text for e in examples], size, self.text_tokens)
        return pictures(examples) | {"judge": asked._asdict(), "score": np.array(
            [_number(e) for e in examples], np.float32)}


def _number(example) -> float:
    try:
        return float(example.answer)
    except ValueError:
        raise InputError(f"{example.name}: its answer {example.answer!r} is not a score") from None


def _turns(chat, turns, end) -> list[tuple[list[int], list[int]]]:
    """The tokens of questions, from the end of the answer before on, and of their answers."""
    tokens = chat.tokenizer
    return [(tokens(f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids,
             [*tokens(answer).input_ids, end]) for question, answer in turns]


def _cut(chat, text, tokens):
    ids = chat.tokenizer(text).input_ids
    return text if len(ids) <= tokens else chat.tokenizer.decode(ids[:tokens])


def _chat(inputs: queries.Inputs) -> dict:
    prompt = {"ids": inputs.ids, "mask": inputs.mask,
              "positions": inputs.positions.swapaxes(0, 1)}
    return prompt if inputs.pictures is None else prompt | {"pictures": inputs.pictures._asdict()}
