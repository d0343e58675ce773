"""Data sets of others, and sources of ours, into files for training: done once, offline."""

import dataclasses
import functools
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from unipic_jax.core.errors import InputError
from unipic_jax.data import records, shards
from unipic_jax.data.records import BadRecord, Record
from unipic_jax.data.sources import Source

SUFFIXES = {"jsonl": (".jsonl",), "webdataset": (".tar", ".tar.gz", ".tgz"),
            "parquet": (".parquet",)}
PICTURES = ("jpg", "jpeg", "png", "webp")
LISTED = 20  # bad records that a report names
Entries = Iterator[tuple[str, Callable[[], Record]]]  # a record's place, and what reads it


@dataclasses.dataclass
class Report:
    """How many records were written and skipped, and what is wrong with the first skipped ones."""

    written: int = 0
    skipped: int = 0
    first: list[str] = dataclasses.field(default_factory=list)


def import_folder(source: Path, target: Path, kind: str | None = None,
                  columns: Mapping[str, str] = {}, progress: bool = True) -> Report:
    """Write the records of a folder, or of one file, as shards in the new folder `target`.

    kind: "jsonl", "webdataset" or "parquet"; by default what the folder holds. Records have the
    fields target, source, text and answer; `columns` names the ones that are called otherwise.
    Pictures are kept as the files they are. A record that does not decode is skipped and reported.
    Raises InputError where there is nothing to import or the target cannot be written.
    """
    source = Path(source)
    kind, files = _files(source, kind)
    folder = source if source.is_dir() else source.parent
    reader = {"jsonl": _jsonl, "webdataset": _webdataset, "parquet": _parquet}[kind]
    names = {f: columns.get(f, f) for f in ("target", "source", "text", "answer")}
    if unknown := columns.keys() - names.keys():
        raise InputError(f"{min(unknown)!r} is not one of {', '.join(names)}")
    entries = itertools.chain.from_iterable(reader(folder, file, names) for file in files)
    return _store(entries, lambda found: shards.write(target, found), None, progress)


def write_source(source: Source, target: Path, kind: str = "shards",
                 progress: bool = True) -> Report:
    """Write a whole source as "shards", or as the TFDS data set "tfds", in a new folder."""
    def write(found):
        if kind == "shards":
            shards.write(target, found)
        else:
            from unipic_jax.data import tfds_builder
            tfds_builder.write(target, found)

    entries = ((f"{source.name}, record {i}", functools.partial(source.record, i))
               for i in range(len(source)))
    return _store(entries, write, len(source), progress)


def _store(entries: Entries, write, total: int | None, progress: bool) -> Report:
    report = Report()

    def sound():
        for place, read in tqdm(entries, unit=" records", total=total, disable=not progress):
            try:
                record = read()
                for what in ("target", "source"):
                    if getattr(record, what) is not None:
                        records.size(getattr(record, what), what)  # it is of a known format
                records.to_example(record)  # it decodes
                report.written += 1
                yield record
            except BadRecord as e:
                report.skipped += 1
                if len(report.first) < LISTED:
                    report.first.append(f"{place}: {e}")
        if not report.written:
            raise InputError(f"there is nothing to import; {report.skipped} records are bad"
                             + (f", the first being {report.first[0]}" if report.first else ""))

    write(sound())
    return report


def _files(source: Path, kind: str | None) -> tuple[str, list[Path]]:
    if not source.exists():
        raise InputError(f"{source} is missing")
    if kind is not None and kind not in SUFFIXES:
        raise InputError(f"the kind {kind!r} is unknown; use {', '.join(SUFFIXES)}")
    inside = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    found = {k: files for k, suffixes in SUFFIXES.items() if k in (kind or k) and (
        files := [p for p in inside if p.name.lower().endswith(suffixes)])}
    if len(found) != 1:
        kinds = ", ".join(f"*{suffix}" for k in (found or SUFFIXES) for suffix in SUFFIXES[k][:1])
        raise InputError(f"{source} has several kinds of data, {kinds}; name one with --kind"
                         if found else f"{source} has no {kinds} to import")
    return next(iter(found.items()))


def _record(name: str, row: Mapping, names: Mapping[str, str]) -> Record:
    """A record of a row with the wanted fields; what is empty is taken as absent."""
    fields = {f: row.get(column) or None for f, column in names.items()}
    if fields["text"] is None:
        raise BadRecord(f"it has no {names['text']!r}")
    record = Record(name, **fields)
    records.check(record)
    return record


def _jsonl(folder: Path, file: Path, names) -> Entries:
    def read(name, line):
        try:
            row = json.loads(line)
        except ValueError as e:
            raise BadRecord(f"it is not JSON: {e}") from None
        if not isinstance(row, dict):
            raise BadRecord("it is not a JSON object")
        for field in (names["target"], names["source"]):
            if row.get(field):
                row[field] = _inside(file.parent, row[field])
        return _record(name, row, names)

    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                name = f"{file.relative_to(folder)}:{number}"
                yield name, functools.partial(read, name, line)


def _inside(folder: Path, path) -> bytes:
    if not isinstance(path, str):
        raise BadRecord(f"it names a picture by {path!r}, which is not a path")
    try:
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise BadRecord(f"it names {path!r}, outside of its folder")
        return (folder / path).read_bytes()
    except (OSError, ValueError) as e:
        raise BadRecord(f"its picture {path!r} cannot be read: "
                        f"{getattr(e, 'strerror', None) or e}") from None


def _webdataset(folder: Path, file: Path, names) -> Entries:
    """key.jpg or .png or .webp with key.txt or .json; key.source.jpg where there is a source."""
    def read(name, parts):
        row = {}
        try:
            if "json" in parts:
                row = dict(json.loads(parts["json"]))
            if "txt" in parts:
                row[names["text"]] = parts["txt"].decode().strip()
        except (ValueError, TypeError) as e:
            raise BadRecord(f"its text cannot be read: {e}") from None
        for field, prefix in (("target", ""), ("source", "source.")):
            found = [parts[prefix + s] for s in PICTURES if prefix + s in parts]
            row[names[field]] = found[0] if found else None
        if row.get(names["answer"]) and not row[names["source"]]:  # its one picture is asked about
            row[names["source"]] = row.pop(names["target"])
        return _record(name, row, names)

    name = str(file.relative_to(folder))
    try:
        with tarfile.open(file) as tar:
            members = ((Path(m.name).parent / Path(m.name).name.split(".")[0], m)
                       for m in tar if m.isfile())
            for key, group in itertools.groupby(members, key=lambda member: member[0]):
                parts = {m.name.rsplit("/", 1)[-1].partition(".")[2].lower():
                         tar.extractfile(m).read() for _, m in group}
                yield f"{name}:{key}", functools.partial(read, f"{name}:{key}", parts)
    except (tarfile.TarError, EOFError, OSError) as e:
        yield name, functools.partial(_fail, f"the archive is truncated or damaged ({e})")


def _parquet(folder: Path, file: Path, names) -> Entries:
    """Pictures are bytes, or a struct with `bytes`."""
    import pyarrow
    from pyarrow import parquet

    def read(name, row):
        for field in (names["target"], names["source"]):
            if isinstance(row.get(field), dict):
                row[field] = row[field].get("bytes")
        return _record(name, row, names)

    name, number = str(file.relative_to(folder)), 0
    try:
        table = parquet.ParquetFile(file)
        found = table.schema_arrow.names
        if names["text"] not in found:
            raise InputError(f"{file} has no column {names['text']!r} but {', '.join(found)}; say "
                             "which to use with --columns")
        wanted = [column for column in names.values() if column in found]
        for rows in table.iter_batches(64, columns=wanted):
            for row in rows.to_pylist():
                yield f"{name}:{number}", functools.partial(read, f"{name}:{number}", row)
                number += 1
    except (pyarrow.ArrowException, OSError) as e:
        yield name, functools.partial(_fail, f"the file is truncated or damaged ({e})")


def _fail(why: str):
    raise BadRecord(why)
