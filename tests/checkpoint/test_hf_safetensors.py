"""Our reader and writer against the safetensors library, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sealion_jax.checkpoint.safetensors_stream import INDEX_FILE, SafetensorsFolder, read_header
from sealion_jax.checkpoint.safetensors_write import NewTensor, plan_shards, write_file, write_shards
from sealion_jax.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "half": RNG.normal(size=(7, 5)).astype(ml_dtypes.bfloat16),
    "odd bytes": RNG.integers(0, 256, (3, 3), dtype=np.uint8),
    "full": RNG.normal(size=(4, 3, 2)).astype(np.float32),
    "wide": RNG.normal(size=(5,)),
    "empty": np.zeros((0, 4), np.float32),
    "number": np.array(3.5, np.float32),
}
NAMES = {"bfloat16": "BF16", "uint8": "U8", "float32": "F32", "float64": "F64"}


def new_tensor(name: str, array: np.ndarray) -> NewTensor:
    pieces = [array[k : k + 2] for k in range(0, len(array), 2)] if array.ndim else [array]
    return NewTensor(name=name, dtype=NAMES[array.dtype.name], shape=array.shape, parts=lambda: pieces)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    counted: list[int] = []
    tensors = [new_tensor(name, array) for name, array in ARRAYS.items()]
    write_file(tmp_path / "model.safetensors", tensors, on_bytes=counted.append)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert sum(counted) == sum(array.nbytes for array in ARRAYS.values())


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", [new_tensor(name, array) for name, array in ARRAYS.items()])
    for name, tensor in read_header(tmp_path / "x.safetensors").items():
        assert tensor.start % ARRAYS[name].dtype.itemsize == 0, name


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = SafetensorsFolder.open(tmp_path)
    for name, array in ARRAYS.items():
        assert folder.tensors[name].shape == array.shape
        assert b"".join(part.tobytes() for part in folder.raw(name)) == array.tobytes()
    np.testing.assert_array_equal(folder.rows("half"), ARRAYS["half"])
    np.testing.assert_array_equal(folder.rows("full", 1, 3), ARRAYS["full"][1:3])


def test_shards_are_filled_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = [new_tensor(name, array) for name, array in ARRAYS.items()]
    assert list(plan_shards(tensors, 10**6)) == ["model.safetensors"]
    files = write_shards(tmp_path, tensors, max_shard_bytes=90)
    assert files == [*(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)), INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    for file in files[:-1]:
        names = load_file(tmp_path / file).keys()
        assert names == {name for name, place in index["weight_map"].items() if place == file}
    assert sorted(SafetensorsFolder.open(tmp_path).tensors) == sorted(ARRAYS)


def test_a_writer_that_is_given_too_little_says_so(tmp_path: Path) -> None:
    short = NewTensor(name="x", dtype="F32", shape=(4,), parts=lambda: [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="12 bytes instead of 16"):
        write_file(tmp_path / "x.safetensors", [short])


def rewritten(edit: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """A file whose header has been changed."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return change


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda b: b"", "truncated or no safetensors file: it has 0 bytes"),
    "header cut": (lambda b: b[:40], "truncated or no safetensors file: it has 40 bytes"),
    "not safetensors": (lambda b: b"PK\x03\x04" * 200, "truncated or no safetensors file"),
    "data cut": (lambda b: b[:-5], "is truncated: its tensors end at byte"),
    "longer": (lambda b: b + b"....", "4 bytes behind its last tensor"),
    "no JSON": (lambda b: b[:8] + b"?" + b[9:], "its header is not valid JSON"),
    "no object": (lambda b: struct.pack("<Q", 2) + b"[]", "expected a JSON object, found list"),
    "same name twice": (
        lambda b: struct.pack("<Q", 15) + b'{"a":{},"a":{}}',
        "not valid JSON .a name occurs twice",
    ),
    "beyond the end": (
        rewritten(lambda h: h["full"].update(data_offsets=[10**6, 10**6 + 96])),
        "is truncated: its tensors end at byte 1,000,",
    ),
    "negative": (rewritten(lambda h: h["full"].update(data_offsets=[-96, 0])), "which cannot be"),
    "backwards": (rewritten(lambda h: h["full"].update(data_offsets=[96, 0])), "which cannot be"),
    "fractional": (rewritten(lambda h: h["full"].update(shape=[1.5, 4])), "which cannot be"),
    "true is no size": (rewritten(lambda h: h["full"].update(shape=[True, 24])), "which cannot be"),
    "shape and bytes": (
        rewritten(lambda h: h["full"].update(shape=[4, 3, 3])),
        r"full has 96 bytes, but F32 of shape \[4, 3, 3\] takes 144",
    ),
    "unknown dtype": (rewritten(lambda h: h["full"].update(dtype="F4")), "full has dtype 'F4'; known are"),
    "a list for a dtype": (rewritten(lambda h: h["full"].update(dtype=["F32"])), r"has dtype \['F32'\]"),
    "no entry": (rewritten(lambda h: h.update(full=7)), "entry for full is not one of safetensors: 7"),
    "overlap": (
        rewritten(lambda h: h["full"].update(data_offsets=h["wide"]["data_offsets"], shape=[10])),
        "overlaps the tensor before it; the file is damaged",
    ),
    "gap": (rewritten(lambda h: h.pop("full")), "leaves a gap before it; the file is damaged"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case: str, tmp_path: Path) -> None:
    change, message = BAD_FILES[case]
    file = tmp_path / "model.safetensors"
    save_file(ARRAYS, file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        SafetensorsFolder.open(tmp_path)
    assert str(file) in str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": ARRAYS["full"]}, tmp_path / "one.safetensors")
    save_file({"b": ARRAYS["half"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_as_one(sharded: Path) -> None:
    folder = SafetensorsFolder.open(sharded)
    np.testing.assert_array_equal(folder.rows("b"), ARRAYS["half"])
    np.testing.assert_array_equal(folder.rows("a"), ARRAYS["full"])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"two.safetensors missing, of 2 files named in model.safetensors.index"
    ):
        SafetensorsFolder.open(sharded)


def test_a_shard_that_lacks_a_tensor_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(UserError, match=r"two.safetensors lacks c, which model.safetensors.index.json says"):
        SafetensorsFolder.open(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": ARRAYS["full"], "b": ARRAYS["half"]}, sharded / "two.safetensors")
    with pytest.raises(UserError, match="another shard has a too"):
        SafetensorsFolder.open(sharded)


@pytest.mark.parametrize(
    "name", ["../two.safetensors", "/etc/passwd", ".hidden", "", 5, "sub/two.safetensors"]
)
def test_an_index_cannot_name_files_elsewhere(name: object, sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": name})
    with pytest.raises(UserError, match="which is not a file beside the index"):
        SafetensorsFolder.open(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_needs_a_weight_map(weight_map: object, sharded: Path) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(UserError, match='has no "weight_map"'):
        SafetensorsFolder.open(sharded)


def test_weights_of_another_form_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"...")
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        SafetensorsFolder.open(tmp_path)
