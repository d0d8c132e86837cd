"""Safetensors files read one tensor, or one part of a tensor, at a time.

The format (huggingface/safetensors, README "Format"): eight bytes of header length, little-endian; a JSON
header {name: {"dtype", "shape", "data_offsets": [start, stop]}}, offsets counted from the header's end; then
the tensors, row-major, little-endian, without gaps. The library's own `save_file` wants all tensors in memory
at once, and its `safe_open` reads local files only.

Files come from outside: everything the header says is checked against the file before it is used.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from sealion_jax.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Size of an element, by the format's names. What is not listed here is refused."""
NUMPY_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
"""The dtypes that weights are computed with; others are only carried as bytes."""

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_COPY_BYTES = 16 * 2**20
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes from `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: epath.Path
    start: int
    nbytes: int


class SafetensorsFolder:
    """The tensors of a directory with model.safetensors, or shards and their index. Local or gs://."""

    def __init__(self, directory: epath.Path, tensors: dict[str, StoredTensor]) -> None:
        self.directory = directory
        self.tensors = tensors
        self._maps: dict[epath.Path, np.ndarray] = {}

    @classmethod
    def open(cls, directory: epath.PathLike) -> SafetensorsFolder:
        """Reads the headers of all files of `directory`, and checks them.

        Raises:
            UserError: a file is missing, truncated or contradicts itself or the index.
        """
        directory = epath.Path(directory)
        if (directory / SINGLE_FILE).exists():
            return cls(directory, read_header(directory / SINGLE_FILE))
        if not (directory / INDEX_FILE).exists():
            raise UserError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; expected weights in safetensors "
                "form (save those of another form again with Transformers)"
            )
        weight_map = _read_index(directory / INDEX_FILE)
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (directory / shard).exists()]
        if missing:
            raise UserError(
                f"{directory}: {listed(missing)} missing, of {len(shards)} files named in {INDEX_FILE}; "
                "download the checkpoint again"
            )
        return cls(directory, _read_shards(directory, shards, weight_map))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor (BF16 or F32), read-only; those of a local file are mapped."""
        tensor = self.tensors[name]
        count = tensor.shape[0]
        stop = count if stop is None else stop
        row_bytes = tensor.nbytes // max(1, count)
        data = self._bytes(tensor.file, tensor.start + start * row_bytes, (stop - start) * row_bytes)
        return data.view(NUMPY_DTYPES[tensor.dtype]).reshape(stop - start, *tensor.shape[1:])

    def raw(self, name: str) -> Iterator[np.ndarray]:
        """A tensor's bytes, of whatever dtype, a few megabytes at a time."""
        tensor = self.tensors[name]
        for offset in range(0, tensor.nbytes, _COPY_BYTES):
            size = min(_COPY_BYTES, tensor.nbytes - offset)
            yield self._bytes(tensor.file, tensor.start + offset, size)

    def _bytes(self, file: epath.Path, start: int, size: int) -> np.ndarray:
        if "://" in str(file):
            with file.open("rb") as stream:
                stream.seek(start)
                data = np.frombuffer(stream.read(size), np.uint8)
            if data.size != size:
                raise OSError(f"{file}: read {data.size} bytes at {start} instead of {size}")
            return data
        if file not in self._maps:
            self._maps[file] = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
        return self._maps[file][start : start + size]


def read_header(file: epath.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one file, by name, each certain to lie inside it.

    Raises:
        UserError: the file is truncated, or its header is not right.
    """
    file = epath.Path(file)
    total = file.stat().length
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8)) if total >= 8 else (0,)
        if not 2 <= length <= min(_MAX_HEADER_BYTES, total - 8):
            raise UserError(
                f"{file} is truncated or no safetensors file: it has {total:,} bytes, its header would have "
                f"{length:,}"
            )
        text = stream.read(length)
    entries = _parse_object(text, file, what="its header")
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _checked_entry(file, name, entry, base=base) for name, entry in entries.items()}
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=base)
    if end > total:
        raise UserError(
            f"{file} is truncated: its tensors end at byte {end:,}, the file at {total:,}; download it again"
        )
    _check_no_gaps(file, tensors.values(), base=base, total=total)
    return tensors


def _checked_entry(file: epath.Path, name: str, entry: Any, *, base: int) -> StoredTensor:
    """One line of a header; raises UserError where dtype, shape and byte range do not agree."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{file}: the header's entry for {name} is not one of safetensors: {entry!r}"
        ) from None
    if any(type(number) is not int or number < 0 for number in numbers) or stop < start:
        raise UserError(f"{file}: {name} has shape {shape} and bytes {start} to {stop}, which cannot be")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(f"{file}: {name} has dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - start != expected:
        raise UserError(
            f"{file}: {name} has {stop - start:,} bytes, but {dtype} of shape {shape} takes {expected:,}"
        )
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), file=file, start=base + start, nbytes=expected
    )


def _check_no_gaps(file: epath.Path, tensors: Iterable[StoredTensor], *, base: int, total: int) -> None:
    """Raises UserError unless the tensors lie one behind the other from `base` to the file's end."""
    end = base
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            wrong = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise UserError(f"{file}: {tensor.name} {wrong}; the file is damaged")
        end += tensor.nbytes
    if end != total:
        raise UserError(f"{file}: {total - end:,} bytes behind its last tensor; the file is damaged")


def _parse_object(text: bytes, file: epath.Path, *, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys; `what` names it in messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {what} is not valid JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _read_index(file: epath.Path) -> dict[str, str]:
    """Tensor name -> file name, from an index whose file names stay in its directory."""
    weight_map = _parse_object(file.read_bytes(), file, what="the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f'{file} has no "weight_map"; download it again')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard != os.path.basename(shard) or shard[0] == ".":
            raise UserError(
                f"{file}: {name} is said to be in {shard!r}, which is not a file beside the index"
            )
    return weight_map


def _read_shards(
    directory: epath.Path, shards: Sequence[str], weight_map: dict[str, str]
) -> dict[str, StoredTensor]:
    """The tensors of all shards; raises UserError where the index and the shards disagree."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        found = read_header(directory / shard)
        lacking = [name for name, place in weight_map.items() if place == shard and name not in found]
        if lacking:
            raise UserError(
                f"{directory / shard} lacks {listed(lacking)}, which {INDEX_FILE} says it has; "
                "download both files again"
            )
        twice = [name for name in found if weight_map.get(name, shard) != shard or name in tensors]
        if twice:
            raise UserError(
                f"{directory / shard}: another shard has {listed(twice)} too; remove the stale shard"
            )
        tensors |= found
    return tensors


def listed(names: Sequence[str]) -> str:
    """The names with commas, the first ten of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
