"""What is learned from: one kind of example for every task, and how it is stored.

A stored record is msgpack. Its pictures are the bytes of PNG, JPEG or WebP files, exactly as they
came; its `cached` arrays are the outputs of frozen encoders, and the index of the shards names the
encoder that made them.
"""

import dataclasses
import io

import ml_dtypes
import msgpack
import numpy as np
from PIL import Image

from unipic_jax.core import images
from unipic_jax.core.errors import InputError

TASKS = ("generate", "edit", "describe")
SCHEMA = "unipic.example.1"
FORMATS = ("PNG", "JPEG", "WEBP")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
CACHE_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# What an encoder may have made, by what it was made from.
PICTURE_CACHES = ("target_moments", "source_moments")
TEXT_CACHES = ("context", "pooled")


class BadRecord(InputError):
    """A record that cannot be used; the message says what is wrong with it."""


def _task(record) -> str:
    if record.answer is not None:
        return "describe"
    return "generate" if record.source is None else "edit"


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to draw from a caption, an edit to make, or a question to answer.

    Of a caption or an edit, an answer describes its target, or what changes, to be given by a
    language model that does not see the target. `turns` are further questions of the same chat
    with their answers. Pictures are uint8 [H, W, 3].
    """

    name: str  # says in a log where it came from
    text: str  # the caption, the instruction or the question
    target: np.ndarray | None = None  # the picture to draw
    source: np.ndarray | None = None  # the picture that is edited or asked about
    answer: str | None = None
    cached: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def task(self) -> str:
        return _task(self)


@dataclasses.dataclass(frozen=True)
class Record:
    """An example as it is stored: its pictures are the bytes of picture files."""

    name: str
    text: str
    target: bytes | None = None
    source: bytes | None = None
    answer: str | None = None
    cached: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def task(self) -> str:
        return _task(self)

    @property
    def picture(self) -> bytes:
        """The picture that decides the record's size: the target, or what is asked about."""
        return self.source if self.target is None else self.target


def check(record: Record) -> None:
    """Raises BadRecord where fields are of the wrong type or do not make up a task."""
    for field, kind in (("name", str), ("text", str), ("target", bytes | None),
                        ("source", bytes | None), ("answer", str | None)):
        if not isinstance(getattr(record, field), kind):
            raise BadRecord(f"its {field} is of type {type(getattr(record, field)).__name__}")
    if not all(len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in record.turns):
        raise BadRecord("its turns are not pairs of a question and an answer")
    if record.turns and record.answer is None:
        raise BadRecord("it has turns but no answer before them")
    if record.answer is None and record.target is None:
        raise BadRecord("it has neither a target picture nor an answer")
    if record.source is None and record.target is None:
        raise BadRecord("it has no picture")


def size(picture: bytes, what: str) -> tuple[int, int]:
    """(width, height) of a picture file, upright, from its header; BadRecord if it has none."""
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
            width, height = opened.size
            sideways = opened.getexif().get(0x0112) in SIDEWAYS
    except Exception as e:  # PIL's readers raise many kinds for a broken file
        raise BadRecord(f"its {what} is not a PNG, JPEG or WebP picture") from e
    return (height, width) if sideways else (width, height)


def pixels(picture: bytes, what: str) -> np.ndarray:
    """A picture file as uint8 [H, W, 3], upright, over white; BadRecord where it is broken."""
    file = io.BytesIO(picture)
    try:
        return np.asarray(images.open_picture(file))
    except InputError as e:
        raise BadRecord(str(e).replace(str(file), f"its {what}")) from None


def png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def to_record(example: Example) -> Record:
    """An example with its pictures as PNG, which loses nothing."""
    target, source = (None if p is None else png(p) for p in (example.target, example.source))
    return Record(example.name, example.text, target, source, example.answer, example.cached,
                  example.turns)


def to_example(record: Record) -> Example:
    """A stored record with its pictures decoded; BadRecord where one does not decode."""
    check(record)
    target, source = (None if p is None else pixels(p, what) for p, what in (
        (record.target, "target"), (record.source, "source")))
    return Example(record.name, record.text, target, source, record.answer, record.cached,
                   record.turns)


def encode(record: Record) -> bytes:
    """A record as bytes; BadRecord where it does not make up an example."""
    check(record)
    cached = {k: {"dtype": a.dtype.name, "shape": a.shape, "data": a.tobytes()}
              for k, a in record.cached.items()}
    return msgpack.packb({"schema": SCHEMA, "name": record.name, "text": record.text,
                          "target": record.target, "source": record.source,
                          "answer": record.answer, "turns": record.turns, "cached": cached})


def unpack(raw: bytes) -> Record:
    """The record in bytes that `encode` made; BadRecord where they are something else."""
    try:
        fields = msgpack.unpackb(raw)
    except Exception:  # msgpack raises many kinds for broken bytes
        raise BadRecord("it is truncated or damaged") from None
    schema = fields.pop("schema", None) if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise BadRecord(f"its schema is {schema!r} where {SCHEMA!r} is expected")
    try:
        cached = {k: np.frombuffer(a["data"], CACHE_DTYPES[a["dtype"]]).reshape(a["shape"])
                  for k, a in fields.pop("cached").items()}
        turns = tuple(map(tuple, fields.pop("turns", ())))  # which earlier shards have not
        record = Record(**fields, turns=turns, cached=cached)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise BadRecord(f"its fields are not those of {SCHEMA!r}") from None
    check(record)
    return record


def decode(raw: bytes) -> Example:
    """The example in bytes that `encode` made; BadRecord says what is wrong with them."""
    return to_example(unpack(raw))
