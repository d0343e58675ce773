"""Our own files: ArrayRecord shards of records, and an index of what is in them.

    shard-00000.array_record ...  one record a group, so that each is read alone
    index.json                    schema, shards, the encoder that made cached arrays
    index.npz                     the task and the size of each record
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from unipic_jax.core.config import read_json
from unipic_jax.core.errors import InputError
from unipic_jax.core.files import new_folder
from unipic_jax.data import records
from unipic_jax.data.records import SCHEMA, TASKS, BadRecord, Example, Record

SHARD_BYTES = 2**29


def write(folder: Path, examples: Iterable[Record], *, encoder: str | None = None,
          shard_bytes: int = SHARD_BYTES) -> int:
    """Write records in shards of about `shard_bytes`, all or nothing, and count them.

    encoder: a hash of what made the cached arrays, see `Shards.encoder`. Raises InputError where
    the folder exists or the disk is full, BadRecord where a record does not make up an example.
    """
    shards, tasks, sizes = [], [], []
    with new_folder(folder) as partial:
        writer, room = None, 0
        try:
            for record in examples:
                raw = records.encode(record)
                sizes.append(records.size(record.picture, "picture"))
                tasks.append(TASKS.index(record.task))
                if writer is None or room < len(raw):
                    _close(writer)
                    shards.append({"file": f"shard-{len(shards):05d}.array_record", "records": 0})
                    path, room = partial / shards[-1]["file"], shard_bytes
                    writer = _call(ArrayRecordWriter, str(path), "group_size:1")
                _call(writer.write, raw)
                shards[-1]["records"] += 1
                room -= len(raw)
        finally:
            _close(writer)
        for shard in shards:
            shard["bytes"] = (partial / shard["file"]).stat().st_size
        np.savez_compressed(partial / "index.npz", task=np.array(tasks, np.uint8),
                            size=np.array(sizes, np.int32).reshape(-1, 2))
        index = {"schema": SCHEMA, "encoder": encoder, "shards": shards}
        (partial / "index.json").write_text(json.dumps(index, indent=1))
    return len(tasks)


def _call(function, *args):
    try:
        return function(*args)
    except RuntimeError as e:  # how the writer says that the disk is full
        raise OSError(str(e).split(";")[0]) from None


def _close(writer):
    if writer is not None and writer.is_open():
        _call(writer.close)


class Shards:
    """The examples of a folder that `write` made.

    `encoder` is the hash of what made the records' cached arrays, None without any. Raises
    InputError where the folder is not one, or a shard is missing or truncated.
    """

    def __init__(self, path: str):
        folder = Path(path)
        index = read_json(folder / "index.json")
        try:
            schema, self.encoder = index["schema"], index["encoder"]
            files = [(folder / s["file"], s["records"], s["bytes"]) for s in index["shards"]]
            with np.load(folder / "index.npz") as arrays:
                self._tasks, self._sizes = arrays["task"], arrays["size"]
            count = sum(n for _, n, _ in files)
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise InputError(f"{folder} has a damaged index ({e}); write it again") from None
        if schema != SCHEMA:
            raise InputError(f"{folder} has the schema {schema!r} where {SCHEMA!r} is expected; "
                             "import the data again")
        if not len(self._tasks) == len(self._sizes) == count:
            raise InputError(f"{folder}/index.npz and index.json disagree; write the folder again")
        for file, _, size in files:
            if not file.is_file():
                raise InputError(f"{file} is missing; write the folder again")
            if file.stat().st_size != size:
                raise InputError(f"{file} has {file.stat().st_size} bytes where {size} were "
                                 "written: it is truncated; write or copy it again")
        self.name = folder.name
        self._count = count
        # The counts are known, so that no file is opened before it is read.
        self._data = files and ArrayRecordDataSource([f"{file}[0:{n}]" for file, n, _ in files])

    def __len__(self):
        return self._count

    def record(self, i: int) -> Record:
        try:
            return records.unpack(self._data[i])
        except RuntimeError as e:
            raise BadRecord(f"it cannot be read: {str(e).split(';')[0]}") from None

    def __getitem__(self, i: int) -> Example:
        return records.to_example(self.record(i))

    def tasks(self):
        return self._tasks

    def sizes(self):
        return self._sizes
