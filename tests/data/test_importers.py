"""Importers and exports, TFDS without TensorFlow, and what is said of bad records."""

import io
import json
import logging
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from unipic_jax.core.errors import InputError
from unipic_jax.data import importers, pipeline, records, shards
from unipic_jax.data.records import Example, Record
from unipic_jax.data.sources import InMemory, open_source

RNG = np.random.default_rng(0)


def picture(kind="jpeg", size=(24, 16)):
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def rows():
    """Two of each task; then text missing, and a picture cut short."""
    out = [{"target": picture(), "text": f"draw {i}"} for i in range(2)]
    out += [{"target": picture("png"), "source": picture("webp", (8, 40)), "text": f"edit {i}"}
            for i in range(2)]
    out += [{"source": picture(), "text": "what?", "answer": f"cat {i}"} for i in range(2)]
    return [*out, {"target": picture()}, {"target": picture()[:-100], "text": "cut"}]


def jsonl(folder, rows):
    folder.mkdir()
    lines = []
    for i, row in enumerate(rows):
        row = dict(row)
        for field in ("target", "source"):
            if field in row:
                (folder / f"{i}.{field}").write_bytes(row[field])
                row[field] = f"{i}.{field}"
        lines.append(json.dumps(row))
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n\n")


def webdataset(folder, rows):
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"part-{part}.tar", "w") as tar:
            for i, row in enumerate(rows[part * 4:part * 4 + 4]):
                asked = "answer" in row
                parts = {"jpg": row["source"] if asked else row["target"]}
                if "source" in row and not asked:
                    parts["source.webp"] = row["source"]
                if asked:
                    parts["json"] = json.dumps(
                        {"text": row["text"], "answer": row["answer"]}).encode()
                elif "text" in row:
                    parts["txt"] = row["text"].encode()
                for suffix, raw in parts.items():
                    entry = tarfile.TarInfo(f"deep/{part}{i}.{suffix}")
                    entry.size = len(raw)
                    tar.addfile(entry, io.BytesIO(raw))


def parquets(folder, rows):
    folder.mkdir()
    columns = {f: [row.get(f) for row in rows] for f in ("source", "text", "answer")}
    columns["target"] = [row.get("target") and {"bytes": row["target"], "path": None}
                         for row in rows]
    parquet.write_table(pa.table(columns), folder / "all.parquet", row_group_size=3)


@pytest.mark.parametrize("make", [jsonl, webdataset, parquets])
def test_import(tmp_path, rows, make):
    make(tmp_path / "from", rows)
    report = importers.import_folder(tmp_path / "from", tmp_path / "to", progress=False)
    assert (report.written, report.skipped) == (6, 2)
    assert "it has no 'text'" in report.first[0]
    assert "its target cannot be read as a picture: image file is truncated" in report.first[1]
    source = open_source({"kind": "shards", "path": str(tmp_path / "to")})
    for i, row in enumerate(rows[:6]):
        record = source.record(i)
        for field in ("target", "source", "text", "answer"):
            assert getattr(record, field) == row.get(field)
    assert source.tasks().tolist() == [0, 0, 1, 1, 2, 2]


def test_columns_have_other_names(tmp_path, rows):
    (tmp_path / "from").mkdir()
    table = pa.table({"image": [r["target"] for r in rows[:2]], "caption": ["a", "b"]})
    parquet.write_table(table, tmp_path / "from/x.parquet")
    with pytest.raises(InputError, match="no column 'text' but image, caption; say which"):
        importers.import_folder(tmp_path / "from", tmp_path / "to", progress=False)
    assert not (tmp_path / "to").exists()
    columns = {"target": "image", "text": "caption"}
    report = importers.import_folder(
        tmp_path / "from", tmp_path / "to", columns=columns, progress=False)
    assert report == importers.Report(2, 0, [])
    with pytest.raises(InputError, match="'picture' is not one of target, source"):
        importers.import_folder(tmp_path / "from", tmp_path / "2", columns={"picture": "image"})


def test_jsonl_refuses_what_it_cannot_use(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture("png"))
    (tmp_path / "from").mkdir()
    (tmp_path / "from/x.png").write_bytes(picture("png"))
    (tmp_path / "from/x.gif").write_bytes(picture("gif"))
    lines = ['{"target": "x.png", "text": "good"}', "{", "[1]", '{"target": 3, "text": "a"}',
             '{"target": "../secret.png", "text": "a"}', '{"target": "y.png", "text": "a"}',
             '{"text": "a"}', '{"target": "x.png", "text": 3}', '{"target": "x\\u0000", "text": 3}',
             '{"target": "x.gif", "text": "a"}']
    (tmp_path / "from/a.jsonl").write_text("\n".join(lines))
    report = importers.import_folder(tmp_path / "from", tmp_path / "to", progress=False)
    assert report.written == 1
    for line, why in zip(report.first, (
            "a.jsonl:2: it is not JSON", "a.jsonl:3: it is not a JSON object",
            "a.jsonl:4: it names a picture by 3", "'../secret.png', outside of its folder",
            "its picture 'y.png' cannot be read: No such file", "neither a target picture nor an",
            "its text is of type int", "cannot be read",
            "its target is not a PNG, JPEG or WebP"), strict=True):
        assert why in line


def test_damaged_archives(tmp_path, rows):
    webdataset(tmp_path / "from", rows)
    raw = (tmp_path / "from/part-0.tar").read_bytes()
    (tmp_path / "from/part-0.tar").write_bytes(raw[:2500])
    report = importers.import_folder(tmp_path / "from", tmp_path / "to", progress=False)
    assert report.written >= 2
    assert "part-0.tar: the archive is truncated or damaged" in report.first[0]
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="nothing to import; 1 records are bad, the first being x"):
        importers.import_folder(tmp_path / "p", tmp_path / "to2", progress=False)
    assert not (tmp_path / "to2").exists()


def test_nothing_to_import(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        importers.import_folder(tmp_path / "no", tmp_path / "to")
    with pytest.raises(InputError, match=r"has no \*.jsonl, \*.tar, \*.parquet to import"):
        importers.import_folder(tmp_path, tmp_path / "to")
    for name in ("a.jsonl", "b.tar"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"several kinds of data, \*.jsonl, \*.tar; name one with"):
        importers.import_folder(tmp_path, tmp_path / "to")
    with pytest.raises(InputError, match="the kind 'csv' is unknown"):
        importers.import_folder(tmp_path, tmp_path / "to", "csv")
    with pytest.raises(InputError, match="there is nothing to import; 0 records are bad"):
        importers.import_folder(tmp_path, tmp_path / "to", "jsonl", progress=False)


ARRAY = RNG.integers(0, 256, (16, 24, 3), np.uint8)
EXAMPLES = [Example("a", "draw", ARRAY), Example("b", "édit", ARRAY, ARRAY[:, ::-1]),
            Example("c", "what?", None, ARRAY, "cat")]


def test_write_source_as_shards(tmp_path):
    report = importers.write_source(InMemory("x", EXAMPLES), tmp_path / "to", progress=False)
    assert report == importers.Report(3, 0, [])
    same([shards.Shards(tmp_path / "to")[i] for i in range(3)], EXAMPLES)


@pytest.mark.parametrize("task", ["generate", "edit", "describe"])
def test_blocks_on_demand(tmp_path, task):
    source = open_source({"kind": "blocks", "task": task, "seed": 0, "length": 9})
    assert source.tasks().tolist() == [records.TASKS.index(task)] * 9
    assert source.sizes().tolist() == [[48, 48]] * 9
    importers.write_source(source, tmp_path / "to", progress=False)
    same([shards.Shards(tmp_path / "to")[i] for i in range(9)], [source[i] for i in range(9)])


def same(found, expected):
    assert {(e.name, e.text, e.answer) for e in found} == {
        (e.name, e.text, e.answer) for e in expected}
    by_name = {e.name: e for e in found}
    for example in expected:
        for field in ("target", "source"):
            np.testing.assert_array_equal(
                getattr(by_name[example.name], field), getattr(example, field))


WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
from unipic_jax.data import records, sources, tfds_builder
png = records.png(records.np.zeros((4, 6, 3), "uint8"))
tfds_builder.write(sys.argv[1], [records.Record(str(i), f"x{i}", png) for i in range(9)])
source = sources.open_source({"kind": "tfds", "name": "unipic_examples", "split": "train",
                              "data_dir": sys.argv[1]})
assert sorted(source[i].text for i in range(9)) == [f"x{i}" for i in range(9)]
assert source[0].target.shape == (4, 6, 3)
"""


def test_tfds_needs_no_tensorflow(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT_TENSORFLOW, tmp_path / "to"], check=True)


def test_tfds_round_trip(tmp_path):
    importers.write_source(InMemory("x", EXAMPLES), tmp_path / "to", "tfds", progress=False)
    spec = {"kind": "tfds", "name": "unipic_examples", "split": "train",
            "data_dir": str(tmp_path / "to")}
    source = open_source(spec)
    same([source[i] for i in range(3)], EXAMPLES)
    assert sorted(source.tasks().tolist()) == [0, 1, 2]
    assert source.sizes().tolist() == [[24, 16]] * 3
    for wrong, message in (({"split": "test"}, "split test, cannot be opened in .*Unknown split"),
                           ({"name": "nowhere"}, "nowhere, split train, cannot be opened"),
                           ({"features": {"target": "image"}}, "has no feature 'image' but name"),
                           ({"features": {"picture": "target"}}, "'picture' is not one of name")):
        with pytest.raises(InputError, match=message):
            open_source(spec | wrong)


def test_tfds_with_a_bad_record(tmp_path, caplog):
    from unipic_jax.data import tfds_builder
    good = [Record(f"r{i}", "make it", picture(), picture()) for i in range(3)]
    tfds_builder.write(tmp_path / "to", [*good, Record("bad", "poem", b"a poem")])
    source = open_source({"kind": "tfds", "name": "unipic_examples", "split": "train",
                          "data_dir": str(tmp_path / "to")})
    assert sorted(source.tasks().tolist()) == [1, 1, 1, 255]
    assert "its picture is not a PNG, JPEG or WebP picture" in caplog.text
    stream = pipeline.batches([(source, 1.0)], {"generate": shapes, "edit": shapes}, batch=4,
                              sizes=((32, 16),), seed=0)
    assert [next(stream)[0] for _ in range(3)] == ["edit"] * 3
    stream.close()


def test_tfds_data_set_of_others(tmp_path):
    import tensorflow_datasets as tfds

    class Others(tfds.core.GeneratorBasedBuilder):
        VERSION, pkg_dir_path = tfds.core.Version("1.0.0"), tmp_path

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(), "label": tfds.features.ClassLabel(
                    names=["cat", "dog"]),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()})}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"image": io.BytesIO(picture("jpeg", (24, 16 + i))), "label": i % 2,
                          "captions": [{"text": f"first {i}"}, {"text": "second"}]}

    Others(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    spec = {"kind": "tfds", "name": "others", "split": "train", "data_dir": str(tmp_path)}
    source = open_source(spec | {"features": {"target": "image", "text": "label"}})
    assert sorted(source[i].text for i in range(4)) == ["cat", "cat", "dog", "dog"]
    assert source[0].task == "generate"
    assert sorted(source.sizes()[:, 1]) == [16, 17, 18, 19]
    source = open_source(spec | {"features": {"target": "image", "text": "captions/text"}})
    assert sorted(source[i].text for i in range(4)) == [f"first {i}" for i in range(4)]


def shapes(found):
    return {"target": np.stack([e.target for e in found])}


@pytest.mark.parametrize("kind", ["shards", "tfds"])
def test_files_feed_the_pipeline(tmp_path, kind, caplog):
    """From files through worker processes; a picture that does not decode is replaced."""
    found = [Record(f"r{i}", "x", picture("jpeg", (40, 30))) for i in range(8)]
    cut = found[3].target[:-200]
    found[3] = Record("r3", "cut", cut)
    if kind == "shards":
        shards.write(tmp_path / "to", found)
        spec = {"kind": "shards", "path": str(tmp_path / "to")}
    else:
        from unipic_jax.data import tfds_builder
        tfds_builder.write(tmp_path / "to", found)
        spec = {"kind": "tfds", "name": "unipic_examples", "split": "train",
                "data_dir": str(tmp_path / "to")}
    streams = [pipeline.batches([(open_source(spec), 1.0)], {"generate": shapes}, batch=4,
                                sizes=((32, 16), (16, 32)), seed=0, workers=w) for w in (0, 1)]
    with caplog.at_level(logging.WARNING):
        steps = [[next(s) for _ in range(4)] for s in streams]
    for (_, a), (_, b) in zip(*steps):
        assert a["target"].shape == (4, 16, 32, 3)
        np.testing.assert_array_equal(a["target"], b["target"])
    for stream in streams:
        stream.close()
        (place, why), = stream.bad.items()
        assert place.startswith(f"{open_source(spec).name}, record ")
        assert "its target cannot be read as a picture: image file is truncated" in why
    assert caplog.text.count("bad record 1 is replaced") == 2
