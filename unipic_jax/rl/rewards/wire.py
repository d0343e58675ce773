"""Samples as JSON, with their pictures as PNG in base64: what clients and servers exchange.

`GET /health` is answered by {"name", "version", "scores": [names]}. `POST /score` takes
{"samples": [{"id", "image", "prompt", "metadata", "reference"}]}, of which the reference may be
missing, and is answered by {"version", "samples": [{"id", "scores": {name: number}}]} in any
order, with {"id", "error": why} for a sample that cannot be scored. What cannot be answered gets
another status and {"error": why}.
"""

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unipic_jax.core.errors import InputError
from unipic_jax.core.images import to_rgb
from unipic_jax.rl.rewards.host import Sample, Score

MOST_PIXELS = 2**24  # of a picture: 4096x4096


def encode(image: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as PNG in base64."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", compress_level=1)  # time is dearer than bytes here
    return base64.b64encode(data.getvalue()).decode()


def decode(text: str) -> np.ndarray:
    """The picture uint8 [H, W, 3] of `encode`; InputError where it is none."""
    try:
        data = base64.b64decode(text, validate=True)
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        if picture.width * picture.height > MOST_PIXELS:
            raise InputError(f"a picture has {picture.width}x{picture.height} pixels; "
                             f"{MOST_PIXELS // 2**20} Mi are the most")
        return np.asarray(to_rgb(picture))
    except (binascii.Error, TypeError, ValueError, OSError, SyntaxError,
            Image.DecompressionBombError):  # PIL raises SyntaxError for a broken chunk
        raise InputError("a picture is not a PNG in base64") from None


def samples_to_json(samples: Sequence[Sample]) -> dict:
    """The body of a request."""
    return {"samples": [
        {"id": s.id, "image": encode(s.image), "prompt": s.prompt, "metadata": s.metadata}
        | ({} if s.reference is None else {"reference": encode(s.reference)}) for s in samples]}


def samples_from_json(body) -> list[Sample]:
    """The samples of a request; InputError where it is malformed."""
    entries = body.get("samples") if isinstance(body, dict) else None
    if not isinstance(entries, list):
        raise InputError('a request must be {"samples": [...]}')
    samples = []
    for entry in entries:
        for name, kind in (("id", int), ("image", str), ("prompt", str), ("metadata", dict)):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise InputError(f"each sample must have {name}, of type {kind.__name__}")
        reference = entry.get("reference")
        samples.append(Sample(entry["id"], decode(entry["image"]), entry["prompt"],
                              entry["metadata"], None if reference is None else decode(reference)))
    if len({s.id for s in samples}) != len(samples):
        raise InputError("two samples have the same id")
    return samples


def score_to_json(score: Score) -> dict:
    """An entry of an answer."""
    if score.values is None:
        return {"id": score.id, "error": score.error}
    return {"id": score.id, "scores": score.values}
