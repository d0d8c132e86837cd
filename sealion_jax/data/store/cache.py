"""What of stores in buckets has been read, kept on this machine: for the next epoch, and the next start.

    <folder>/<key>/00000017      block 17 of a shard, and behind it the block's sha256
    <folder>/<key>/whole         every block was there once, and together they had the manifest's sha256

The key is a hash of the file's path and of its sha256 in the manifest, so a store that is prepared anew under
the same name has nothing in common with the one before. Processes may share the folder: what is in it appears
under its name when it is complete, is checked when a process first reads it, and may be removed at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sealion_jax.checks import check_number
from sealion_jax.data.files import user_cache
from sealion_jax.data.store.manifest import StoredFile
from sealion_jax.errors import UserError
from sealion_jax.storage import file_system, write_whole

BLOCK_BYTES = 1 << 20
_DIGEST_BYTES = 32
_WHOLE = "whole"
_RECOUNT_BYTES = 256 << 20
_UNUSED_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where blocks of stores in buckets are kept on each machine, and how much of its disk they may take."""

    folder: str | None = None
    """A folder on the machine's own disk; None is ~/.cache/sealion_jax/blocks (see XDG_CACHE_HOME)."""
    most_gigabytes: float | None = None
    """Once so much is kept, more is read and not kept. With None the last tenth of the disk is left free."""

    def __post_init__(self) -> None:
        if self.most_gigabytes is not None:
            check_number("data.cache.most_gigabytes", self.most_gigabytes, least=0)

    @property
    def place(self) -> Path:
        """The folder that is meant."""
        return user_cache() / "blocks" if self.folder is None else Path(self.folder).expanduser()


class Room:
    """How much more the cache's folder may hold; threads may share it.

    There is no order in which blocks leave: all windows of a store are read equally often, so of a store that
    does not fit, any part that stays serves as well as another. Only what belongs to files that nobody has
    added to or opened for a day goes, when room is needed.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.folder = config.place
        limit = config.most_gigabytes
        self._limit_bytes = None if limit is None else int(limit * 1e9)
        self._lock = threading.Lock()
        self._used: int | None = None
        self._since_count = 0

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which then count as used."""
        with self._lock:
            if self._used is None or self._since_count > _RECOUNT_BYTES:
                self._count()
            if not self._fits(size):
                self._remove_unused()
                self._count()
            if not self._fits(size):
                return False
            self._used = (self._used or 0) + size
            self._since_count += size
            return True

    def _fits(self, size: int) -> bool:
        if self._limit_bytes is not None and (self._used or 0) + size > self._limit_bytes:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.folder)
        return disk.free - size > disk.total // 10

    def _count(self) -> None:
        """Other processes write, too."""
        self._since_count = 0
        if self._limit_bytes is not None:
            self._used = sum(_size(entry) for folder in self._folders() for entry in _entries(folder))

    def _remove_unused(self) -> None:
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.stat(folder).st_mtime > _UNUSED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[str]:
        return [entry.path for entry in _entries(str(self.folder)) if entry.is_dir()]


class CachedFile:
    """One file of a store in a bucket, read in whole blocks that are kept."""

    def __init__(self, path: str, stored: StoredFile, room: Room, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._system, self._name = file_system(path)
        self._path = path
        self._stored = stored
        self._room = room
        key = hashlib.sha256(f"{path} {stored.sha256}".encode()).hexdigest()[:32]
        self._folder = room.folder / key
        self._block_bytes = block_bytes
        self._num_blocks = -(-stored.bytes // block_bytes)
        self._lock = threading.Lock()
        self._checked: set[int] = set()
        self.fetched_bytes = 0
        with contextlib.suppress(OSError):
            os.utime(self._folder)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file, which must lie inside it."""
        if not 0 <= start <= stop <= self._stored.bytes:
            raise ValueError(
                f"bytes [{start}, {stop}) are not inside {self._name} of {self._stored.bytes} bytes"
            )
        size = self._block_bytes
        return b"".join(
            self._part(index, max(start - index * size, 0), min(stop - index * size, size))
            for index in range(start // size, -(-stop // size) if stop > start else start // size)
        )

    def read_all(self) -> bytes:
        """The whole file."""
        return self.read(0, self._stored.bytes)

    def _part(self, index: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a block."""
        if index in self._checked:
            with contextlib.suppress(OSError), open(self._file(index), "rb") as file:
                part = os.pread(file.fileno(), stop - start, start)
                if len(part) == stop - start:
                    return part
        block = self._kept(index)
        if block is None:
            block = self._fetch(index)
        return block[start:stop]

    def _kept(self, index: int) -> bytes | None:
        """A block as it lies here; None if it does not, or is damaged."""
        try:
            content = self._file(index).read_bytes()
        except OSError:
            return None
        block, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if len(block) != self._length(index) or hashlib.sha256(block).digest() != digest:
            return None
        self._checked.add(index)
        return block

    def _fetch(self, index: int) -> bytes:
        """A block from the bucket, which is kept if there is room."""
        start, length = index * self._block_bytes, self._length(index)
        block = self._system.cat_file(self._name, start=start, end=start + length)
        if len(block) != length:
            raise OSError(f"{self._name} gave {len(block)} bytes for its range [{start}, {start + length})")
        with self._lock:
            self.fetched_bytes += length
        try:
            if self._room.take(length + _DIGEST_BYTES):
                write_whole(self._file(index), block + hashlib.sha256(block).digest())
                self._checked.add(index)
                self._check_whole()
        except FileNotFoundError:
            pass  # removed by another process at this moment
        except OSError as error:
            _tell_unwritable(self._room.folder, error.strerror or type(error).__name__)
        return block

    def _check_whole(self) -> None:
        """Raises UserError if all blocks are here and are not what the manifest says."""
        names = {entry.name for entry in _entries(str(self._folder)) if not entry.name.startswith(".")}
        if _WHOLE in names or len(names) < self._num_blocks:
            return
        digest = hashlib.sha256()
        for index in range(self._num_blocks):
            block = self._kept(index)
            if block is None:
                return
            digest.update(block)
        if digest.hexdigest() != self._stored.sha256:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._checked.clear()
            raise UserError(
                f"{self._path} has other bytes than its manifest says; copy the store again, or run prepare "
                "again"
            )
        write_whole(self._folder / _WHOLE, b"")

    def _length(self, index: int) -> int:
        return min(self._block_bytes, self._stored.bytes - index * self._block_bytes)

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:08d}"


@functools.cache
def _tell_unwritable(folder: Path, reason: str) -> None:
    """Says, once in a process, that nothing more can be kept in a folder."""
    print(
        f"blocks of stores in buckets cannot be kept in {folder} ({reason}), and are read from it each "
        "time; give another --data.cache.folder",
        file=sys.stderr,
    )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # removed by another process
        return 0
