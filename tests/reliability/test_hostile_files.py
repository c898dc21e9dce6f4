"""Single files from strangers: headers, indices and JSON that lie, pipes, devices, long lines."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from checkpoints import STEM, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadjax.errors import MAX_CHARS, InputError, RunStopped
from gadjax.formats.safetensors_file import TYPES, read_header
from gadjax.formats.weights import open_weights
from gadjax.io.untrusted import MAX_JSON_BYTES, is_safe_filename, read_json

pytestmark = pytest.mark.usefixtures("hurry")
FEW = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one_line(call):
    """What it returns, None where it is refused."""
    try:
        return call()
    except (InputError, RunStopped) as error:
        text = str(error)
        assert text.isprintable() and 0 < len(text) <= MAX_CHARS
        return None


@pytest.mark.parametrize("kind", [InputError, RunStopped])
def test_errors_are_one_line_whatever_they_quote(kind):
    error = kind("a\nb\r\u2028\x1b[31m\u202e\ud800 Käse")
    assert str(error) == f"{error}" == "a\\nb\\r\\u2028\\x1b[31m\\u202e\\ud800 Käse"
    for long in (kind("file: " + "x" * 10**6 + "; expected y"), kind("\n" * 10**6)):
        assert len(str(long)) <= MAX_CHARS
    assert str(kind("file: " + "x" * 10**6 + "; expected y")).endswith("; expected y")


def safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**40, 2**63, 2**64, 10**30])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(TYPES)) | VALUES,
        "shape": st.lists(NUMBERS, max_size=40) | VALUES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | VALUES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=9), ENTRIES | VALUES, max_size=3)


@FEW
@given(st.binary(max_size=200) | HEADERS.map(lambda h: json.dumps(h).encode()), st.binary())
def test_any_header(tmp_path, header, data):
    path = safetensors(tmp_path / "model.safetensors", header, data)
    tensors = one_line(lambda: read_header(path))
    if tensors is not None:
        assert sum(tensor.read().nbytes for tensor in tensors.values()) == len(data)


@FEW
@given(VALUES | st.dictionaries(st.text(max_size=9), st.text(max_size=9) | VALUES))
def test_any_index(tmp_path, weight_map):
    safetensors(tmp_path / "one", entry("F32", "1", 4), b"\0" * 4)
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    weights = one_line(lambda: open_weights(tmp_path))
    assert weights is None or set(weight_map.values()) <= {"one"}


def entry(dtype: str, shape: str, end: int) -> bytes:
    """A header of one tensor."""
    text = f'{{"a": {{"dtype": "{dtype}", "shape": [{shape}], "data_offsets": [0, {end}]}}}}'
    return text.encode()


@pytest.mark.parametrize(
    "header, length",
    [
        (b"", 1 << 40),
        (b"{}", (1 << 64) - 1),
        (entry("F32", str(1 << 38), 1 << 40), None),
        (entry("F32", f"{1 << 40}, {1 << 40}, 0", 0), None),
        (entry("F32", f"{(1 << 63) - 1}, 2, 0", 0), None),
        (entry("U8", "1, " * 70 + "1", 1), None),
        (entry("U8", "1" + "0" * 5000, 1), None),
    ],
)
def test_a_header_that_claims_much_allocates_nothing(tmp_path, header, length):
    safetensors(tmp_path / "model.safetensors", header, b"\0", length)
    tracemalloc.start()
    refused(lambda: [value.shape for _, value in open_weights(tmp_path)], "model.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' more than once"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "64 nested values"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "64 nested values"),
        ('{"a": 1' + "0" * 100_000 + "}", "digits"),
        ('\ufeff{"a": 1}', "BOM"),
        ("[1]", "found a list"),
        ("", "Expecting value"),
    ],
)
def test_json_that_can_be_misread(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    refused(lambda: read_json(path), path, words)


def test_json_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    refused(lambda: read_json(path), path, f"more than {MAX_JSON_BYTES} bytes")
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_JSON_BYTES
    tracemalloc.stop()


def test_neither_pipes_nor_devices_nor_folders_are_read(tmp_path):
    pipe, device, folder = tmp_path / "pipe", tmp_path / "device", tmp_path / "folder"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    for path in (pipe, device):
        refused(lambda: read_json(path), path, "no regular file")  # noqa: B023
        refused(lambda: read_header(path), path, "no regular file")  # noqa: B023
    refused(lambda: read_json(folder), folder, "found a folder")
    refused(lambda: read_json(tmp_path / "a\0b"), "null byte")
    refused(lambda: read_json(tmp_path / ("n" * 300)), "too long")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0", "\n", "é" * 200]
)
def test_no_name_of_a_file(name):
    assert (
        not is_safe_filename(name)
        and not is_safe_filename(None)
        and is_safe_filename("model-00001.safetensors")
    )
