"""Safetensors files written one part of a tensor at a time; the format is in safetensors_stream.py."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from sealion_jax.checkpoint.safetensors_stream import INDEX_FILE, ITEM_BYTES, SINGLE_FILE


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to write: `parts()` gives its elements in order, as contiguous arrays of any shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_shards(tensors: Sequence[NewTensor], max_shard_bytes: int) -> dict[str, list[NewTensor]]:
    """File name -> its tensors, in order; a file exceeds `max_shard_bytes` only for a single tensor."""
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{k + 1:05d}-of-{count:05d}.safetensors": shard for k, shard in enumerate(shards)}


def write_shards(
    directory: epath.PathLike,
    tensors: Sequence[NewTensor],
    *,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Writes the tensors as Hugging Face does, with an index if in several files; returns the names."""
    directory = epath.Path(directory)
    plan = plan_shards(tensors, max_shard_bytes)
    for file_name, shard in plan.items():
        write_file(directory / file_name, shard, on_bytes=on_bytes)
    if len(plan) == 1:
        return list(plan)
    weight_map = {tensor.name: file_name for file_name, shard in plan.items() for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [*plan, INDEX_FILE]


def write_file(
    file: epath.PathLike,
    tensors: Sequence[NewTensor],
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one safetensors file, one part of one tensor after the other."""
    file = epath.Path(file)
    # Wide elements first keeps every tensor aligned to its own element size.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    with file.open("wb") as stream:
        stream.write(_header(ordered))
        for tensor in ordered:
            written = 0
            for part in tensor.parts():
                data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                stream.write(data.data)
                written += data.size
                on_bytes(data.size)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: its parts have {written} bytes instead of {tensor.nbytes}")
        stream.flush()
        if "://" not in str(file):
            os.fsync(stream.fileno())


def _header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
