"""How fast a run directory's storage takes and gives files, on a disk or in a bucket."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sealion_jax.storage import file_system, is_remote, remove

_PART_BYTES = 8 * 2**20
_SMALL_FILES = 8


@dataclass(frozen=True, kw_only=True)
class StorageRates:
    """What one process saw while all wrote and read at once."""

    write_mb_per_s: float
    """Until the bytes were safe: synced to disk, or the upload acknowledged."""
    read_mb_per_s: float
    small_write_ms: float
    """Median time to write a file of 1 KiB safely."""


def measure_storage(folder: str, *, process: int, mebibytes: int) -> StorageRates:
    """The rates of one file of so many MiB, which is removed again.

    Bytes are random, so no storage compresses them. Before reading, a local file is dropped from this
    machine's memory; a network file system's server may still have it in its own.
    """
    small, large = f"{folder}/{process}.small", f"{folder}/{process}.large"
    part = os.urandom(_PART_BYTES)
    parts = max(mebibytes * 2**20 // _PART_BYTES, 1)
    total = parts * _PART_BYTES
    times = []
    with _removed(folder, [small, large]):
        for _ in range(_SMALL_FILES):
            began = time.perf_counter()
            with _written(small) as file:
                file.write(part[:1024])
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        with _written(large) as file:
            for _ in range(parts):
                file.write(part)
        written = time.perf_counter() - began
        began = time.perf_counter()
        read = 0
        with _opened(large) as file:
            while chunk := file.read(_PART_BYTES):
                read += len(chunk)
        took = time.perf_counter() - began
    if read != total:
        raise OSError(f"{large}: wrote {total} bytes and read {read}")
    return StorageRates(
        write_mb_per_s=total / written / 1e6,
        read_mb_per_s=total / took / 1e6,
        small_write_ms=statistics.median(times) * 1e3,
    )


@contextlib.contextmanager
def _written(path: str) -> Iterator[IO[bytes] | Any]:
    """A file to write; when the block is done its content is safe."""
    if is_remote(path):
        files, inside = file_system(path)
        with files.open(inside, "wb") as file:
            yield file
        return
    with Path(path).open("wb", buffering=0) as file:
        yield file
        os.fsync(file.fileno())


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes] | Any]:
    """The file to read, from where it is stored."""
    if is_remote(path):
        files, inside = file_system(path)
        with files.open(inside, "rb", block_size=_PART_BYTES) as file:
            yield file
        return
    with Path(path).open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield file


@contextlib.contextmanager
def _removed(folder: str, paths: list[str]) -> Iterator[None]:
    """Makes the folder, and removes the files after the block whatever happens in it."""
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                remove(path)
        if not is_remote(folder):
            with contextlib.suppress(OSError):  # other processes' files are there still
                Path(folder).rmdir()
