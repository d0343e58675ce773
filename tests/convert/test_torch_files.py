"""Safetensors: what the library reads and writes, and headers that nobody should trust."""

import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from unipic_jax.convert.torch_files import MAX_HEADER, Writer, read_header
from unipic_jax.core.errors import InputError

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
         torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
         torch.bool]


def test_reads_what_the_library_writes(tmp_path):
    state = {f"t{i}": (torch.randn(3, i + 1) * 3).to(k) for i, k in enumerate(KINDS)}
    state |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {"format": "pt", "x": "y"})
    tensors, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt", "x": "y"}
    assert tensors.keys() == state.keys()
    for k, v in state.items():
        array = tensors[k].read()
        assert array.shape == tuple(v.shape)
        assert array.tobytes() == v.view(torch.uint8).numpy().tobytes() if v.numel() > 1 else True
    assert tensors["scalar"].read() == 3.5


def test_the_library_reads_what_we_write_in_any_order(tmp_path):
    state = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "é": np.array([1, 2], np.int64),
             "a": np.float16(2.5)[None]}
    writer = Writer(tmp_path / "a.safetensors", {
        "b": ("F32", (2, 3)), "é": ("I64", (2,)), "a": ("F16", (1,))}, {"format": "pt"})
    for k in ("a", "b", "é"):
        writer.write(k, state[k])
    writer.close()
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    for k, v in state.items():
        np.testing.assert_array_equal(read[k], v)
    short = Writer(tmp_path / "b.safetensors", {"a": ("F32", (2,))}, {})
    with pytest.raises(ValueError, match=r"\(3,\) for \(2,\)"):
        short.write("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="never written"):
        short.close()


def header(entries, data=b"\0" * 8, length=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("content", "message"), [
    (b"", "truncated"),
    (b"\1\2\3", "truncated"),
    (header({"a": GOOD}, length=10**6), "truncated"),
    (header({"a": GOOD}, length=2**63), "truncated"),
    (header(b"{nope"), "not JSON"),
    (header(b"\xff\xfe"), "not JSON"),
    (header(b"[" * 100_000), "not JSON"),
    (header(b'{"a": 1, "a": 2}'), "appears twice"),
    (header([1]), "not an object"),
    (header({"__metadata__": 3, "a": GOOD}), "metadata is not an object"),
    (header({"a": 7}), "malformed"),
    (header({"a": GOOD | {"shape": [-2]}}), "malformed"),
    (header({"a": GOOD | {"shape": [True, 2]}}), "malformed"),
    (header({"a": GOOD | {"shape": "22"}}), "malformed"),
    (header({"a": GOOD | {"data_offsets": [0]}}), "malformed"),
    (header({"a": GOOD, "b": GOOD | {"data_offsets": ["x", None]}}), "malformed"),
    (header({"a": GOOD | {"dtype": "F99"}}), "unknown type"),
    (header({"a": GOOD | {"dtype": ["F32"]}}), "malformed"),
    (header({"a": GOOD | {"shape": [2**40, 2**40]}}), "does not lie where it should"),
    (header({"a": GOOD | {"data_offsets": [0, 4]}}), "does not lie where it should"),
    (header({"a": GOOD | {"data_offsets": [4, 12]}}, b"\0" * 12), "does not lie"),
    (header({"a": GOOD, "b": GOOD}), "does not lie"),
    (header({"a": GOOD}, b"\0" * 4), "has .* bytes where its header describes"),
    (header({"a": GOOD}, b"\0" * 9), "has .* bytes where its header describes"),
])
def test_hostile_headers_are_refused(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as e:
        read_header(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as f:
        f.write((MAX_HEADER + 1).to_bytes(8, "little"))
        f.truncate(MAX_HEADER + 100)
    with pytest.raises(InputError, match="its header is 100000001 bytes"):
        read_header(path)


def test_a_file_cut_after_its_header_was_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": GOOD}))
    tensors, _ = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        tensors["a"].read()
