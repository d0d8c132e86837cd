"""Files that may be on this machine or in a bucket: sizes, byte ranges, and a local cache of blocks.

A path with "://" in it is remote and goes through fsspec (gs:// is gcsfs), because a ranged read there is one
request; everything else is a local path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO, cast

from sealion_jax import storage
from sealion_jax.storage import is_remote, write_whole

__all__ = [
    "BlockCache",
    "copy_whole",
    "exists",
    "is_remote",
    "join",
    "open_binary",
    "read_bytes",
    "size",
    "sizes",
    "user_cache",
    "write_whole",
]


def join(folder: object, *names: str) -> str:
    """`folder/name/...` as a string, for local and remote paths."""
    return "/".join([str(folder).rstrip("/"), *names])


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    system, name = storage.file_system(path)
    return system.exists(name)


def size(path: str) -> int:
    """Bytes of a file; raises FileNotFoundError."""
    if not is_remote(path):
        return os.path.getsize(path)
    system, name = storage.file_system(path)
    return int(system.info(name)["size"])


def sizes(folder: str) -> dict[str, int]:
    """Name and bytes of each file in a folder, with one request where it is remote."""
    if not is_remote(folder):
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    system, inner = storage.file_system(folder)
    listed = system.ls(inner, detail=True)
    return {os.path.basename(entry["name"]): entry["size"] for entry in listed if entry["type"] == "file"}


def open_binary(path: str) -> BinaryIO:
    """An open file to read from its beginning."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = storage.file_system(path)
    return cast(BinaryIO, system.open(name, "rb"))


def read_bytes(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()


def user_cache() -> Path:
    """Where to keep what can be had again: $XDG_CACHE_HOME/sealion_jax, or ~/.cache/sealion_jax."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sealion_jax"


class BlockCache:
    """Byte ranges of one remote file, fetched in whole blocks that are kept in a local folder.

    Several threads and processes may share the folder: a block is written aside and renamed. The last tenth
    of the disk is left to others; from then on new blocks are not kept.
    """

    def __init__(self, path: str, folder: Path, *, size_bytes: int, block_bytes: int = 1 << 20) -> None:
        self._system, self._name = storage.file_system(path)
        self._size = size_bytes
        self._folder = folder
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self.fetched_bytes = 0

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file, which must lie inside it."""
        if not 0 <= start <= stop <= self._size:
            raise ValueError(f"bytes [{start}, {stop}) are not inside {self._name} of {self._size} bytes")
        first, last = start // self._block_bytes, (stop - 1) // self._block_bytes
        whole = b"".join(self._block(i) for i in range(first, last + 1))
        skip = start - first * self._block_bytes
        return whole[skip : skip + stop - start]

    def _block(self, index: int) -> bytes:
        start = index * self._block_bytes
        stop = min(start + self._block_bytes, self._size)
        file = self._folder / f"{index:08d}"
        with contextlib.suppress(FileNotFoundError):
            block = file.read_bytes()
            if len(block) == stop - start:
                return block
        block = self._system.cat_file(self._name, start=start, end=stop)
        if len(block) != stop - start:
            raise OSError(f"{self._name} gave {len(block)} bytes for its range [{start}, {stop})")
        with self._lock:
            self.fetched_bytes += len(block)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self._folder)
            if disk.free > disk.total // 10:
                write_whole(file, block)
        return block


def copy_whole(source: Path, target: str) -> None:
    """Copies a local file to a path that may be remote; it is there whole or not at all."""
    if is_remote(target):
        system, name = storage.file_system(target)
        system.put_file(str(source), name)
        return
    aside = Path(f"{target}.partial")
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, aside)
    os.replace(aside, target)
