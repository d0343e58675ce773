"""Stored records and their shards: whole, exact, and clear about what is wrong."""

import dataclasses
import io
import json
import re
import resource
import subprocess
import sys

import ml_dtypes
import msgpack
import numpy as np
import pytest
from PIL import Image

from unipic_jax.core.errors import InputError
from unipic_jax.data import records, shards
from unipic_jax.data.records import BadRecord, Example, Record
from unipic_jax.data.sources import open_source

RNG = np.random.default_rng(0)


def picture(width=24, height=16):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def file(array, kind="jpeg", **options):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


EXAMPLES = [
    Example("a", "draw", picture()),
    Example("b", "edit", picture(), picture(10, 30)),
    Example("c", "what?", None, picture(8, 8), "a cat", {
        "context": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "source_moments": RNG.normal(size=(4,)).astype(np.float16)},
        (("where?", "here"), ("why?", ""))),
]


def test_round_trip():
    for example in EXAMPLES:
        back = records.decode(records.encode(records.to_record(example)))
        assert (back.name, back.text, back.answer, back.task, back.turns) == (
            example.name, example.text, example.answer, example.task, example.turns)
        for a, b in ((back.target, example.target), (back.source, example.source)):
            assert (a is None) == (b is None)
            np.testing.assert_array_equal(a, b) if a is not None else None
        assert back.cached.keys() == example.cached.keys()
        for k, a in example.cached.items():
            assert back.cached[k].dtype == a.dtype
            np.testing.assert_array_equal(back.cached[k], a)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_picture_files_stay_as_they_are(kind):
    raw = file(picture(), kind)
    record = records.unpack(records.encode(Record("x", "text", raw)))
    assert record.target == raw
    assert records.to_example(record).target.shape == (16, 24, 3)
    assert records.size(raw, "target") == (24, 16)


def test_pictures_stand_upright_over_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file(picture(), exif=exif)
    assert records.size(turned, "target") == (16, 24)
    assert records.pixels(turned, "target").shape == (24, 16, 3)
    clear = file(np.zeros((4, 4, 4), np.uint8), "png")
    assert records.pixels(clear, "target").min() == 255


def test_bad_records_say_what_is_wrong():
    good = records.encode(Record("x", "text", file(picture())))
    fields = msgpack.unpackb(good)
    noise = file(picture(64, 64), quality=95)
    for raw, message in (
            (good[:40], "truncated or damaged"),
            (b"", "truncated or damaged"),
            (msgpack.packb([1]), "its schema is None where 'unipic.example.1' is expected"),
            (msgpack.packb(fields | {"schema": "unipic.example.9"}), "its schema is .*9' where"),
            (msgpack.packb(fields | {"extra": 1}), "its fields are not those"),
            (msgpack.packb({k: v for k, v in fields.items() if k != "cached"}), "its fields are"),
            (msgpack.packb(fields | {"cached": {"c": {"dtype": "O", "shape": [1], "data": b""}}}),
             "its fields are not"),
            (msgpack.packb(fields | {"text": 3}), "its text is of type int"),
            (msgpack.packb(fields | {"target": None}), "neither a target picture nor an answer"),
            (msgpack.packb(fields | {"answer": "yes", "target": None}), "it has no picture"),
            (msgpack.packb(fields | {"target": noise[:len(noise) // 2]}),
             "its target cannot be read as a picture: image file is truncated"),
            (msgpack.packb(fields | {"turns": [["where?"]]}), "its turns are not pairs"),
            (msgpack.packb(fields | {"turns": [["a", "b"]]}), "it has turns but no answer"),
            (msgpack.packb(fields | {"turns": 3}), "its fields are not those"),
            (msgpack.packb(fields | {"target": b"poem"}), "its target cannot be read as a pic")):
        with pytest.raises(BadRecord, match=message):
            records.decode(raw)
    with pytest.raises(BadRecord, match="its source is not a PNG, JPEG or WebP picture"):
        records.size(b"poem", "source")
    with pytest.raises(BadRecord, match="neither a target"):
        records.encode(Record("x", "text"))


@pytest.fixture
def folder(tmp_path):
    found = [dataclasses.replace(records.to_record(e), name=f"{e.name}{i}")
             for i in range(20) for e in EXAMPLES]
    assert shards.write(tmp_path / "data", found, encoder="abc", shard_bytes=20_000) == 60
    return tmp_path / "data"


def test_shards(folder):
    source = open_source({"kind": "shards", "path": str(folder)})
    assert len(source) == 60
    assert source.encoder == "abc"
    assert source.tasks().tolist() == [0, 1, 2] * 20
    assert source.sizes().tolist() == [[24, 16], [24, 16], [8, 8]] * 20
    assert len(list(folder.glob("*.array_record"))) > 2
    for i in (0, 31, 59):
        assert source[i].name == f"{EXAMPLES[i % 3].name}{i // 3}"
        np.testing.assert_array_equal(source[i].source, EXAMPLES[i % 3].source)
    with pytest.raises(InputError, match="exists already"):
        shards.write(folder, [])


def test_no_records(tmp_path):
    assert shards.write(tmp_path / "data", []) == 0
    assert len(shards.Shards(tmp_path / "data")) == 0


def test_damaged_shards(folder):
    shard = folder / "shard-00001.array_record"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1000])
    with pytest.raises(InputError, match=r"shard-00001.array_record has \d+ bytes where \d+ were"):
        shards.Shards(folder)
    half = len(raw) // 8
    shard.write_bytes(raw[:half] + bytes(3000) + raw[half + 3000:])
    source, bad = shards.Shards(folder), []
    for i in range(60):
        try:
            assert source[i].name.endswith(str(i // 3))
        except BadRecord as e:
            bad.append(str(e))
    assert 0 < len(bad) < 40
    assert all(why.startswith("it cannot be read: Corrupted") for why in bad)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.array_record is missing"):
        shards.Shards(folder)


def test_damaged_index(folder):
    index = json.loads((folder / "index.json").read_text())
    for text, message in (
            (json.dumps(index | {"schema": "other"}), "has the schema 'other' where"),
            (json.dumps(index | {"shards": index["shards"][:1]}), "disagree; write"),
            ("{}", "has a damaged index"), ("{", "cannot be read as JSON")):
        (folder / "index.json").write_text(text)
        with pytest.raises(InputError, match=message):
            shards.Shards(folder)
    (folder / "index.json").write_text(json.dumps(index))
    raw = (folder / "index.npz").read_bytes()
    for damaged in (raw[:100], b""):
        (folder / "index.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="has a damaged index"):
            shards.Shards(folder)
    with pytest.raises(InputError, match=r"index\.json is missing"):
        shards.Shards(folder.parent)


@pytest.mark.parametrize("kind", ["shards", "tfds"])
def test_full_disk(tmp_path, kind):
    """A limit on the size of files stands for the full disk, in a process of its own."""
    script = f"""
import resource, sys
import numpy as np
from unipic_jax.core.errors import InputError
from unipic_jax.data import records, shards, tfds_builder
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
found = (records.to_record(records.Example(str(i), "x", noise)) for i in range(40))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    {'shards' if kind == 'shards' else 'tfds_builder'}.write({str(tmp_path / 'data')!r}, found)
except InputError as e:
    print("refused:", e)
"""
    assert resource.RLIMIT_FSIZE
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         check=True).stdout
    assert re.search(r"refused: .*data cannot be written: .*File too large", out)
    assert list(tmp_path.iterdir()) == []


def test_open_source_refuses():
    for spec, message in (
            ({"kind": "csv"}, "the kind of data 'csv' is unknown; use blocks, shards, tfds"),
            ({}, "the kind of data None is unknown"),
            ({"kind": "shards"}, "missing a required argument: 'path'"),
            ({"kind": "shards", "path": "x", "split": "y"}, "unexpected keyword argument 'split'"),
            ({"kind": "shards", "path": "/nowhere"}, "index.json is missing")):
        with pytest.raises(InputError, match=message):
            open_source(spec)
