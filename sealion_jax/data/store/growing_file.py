"""Files that only grow, can be cut back to a known length, and know the hash of what they hold."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from sealion_jax.data.store.manifest import StoredFile
from sealion_jax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def explain_write_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room (or choose another output) and run this "
            "again, it goes on where it was"
        ) from error


class GrowingFile:
    """A file that is only appended to, and its running sha256."""

    def __init__(self, path: Path, length: int) -> None:
        """Opens `path`, cut back to `length` bytes; UserError when it is shorter than that."""
        self.path = path
        self.length = length
        self._digest = hashlib.sha256()
        with explain_write_errors(path):
            self._file = io.FileIO(path, "a+")  # unbuffered: after a full disk nothing is left to flush
        found = os.path.getsize(path)
        if found < length:
            raise UserError(
                f"{path} has {found} bytes, at least {length} were written; add --overwrite to start anew"
            )
        self._file.truncate(length)
        self._file.seek(0)
        while piece := self._file.read(1 << 22):
            self._digest.update(piece)

    def append(self, content: bytes) -> None:
        with explain_write_errors(self.path):
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
        self._digest.update(content)
        self.length += len(content)

    def sync(self) -> None:
        with explain_write_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def stored(self) -> StoredFile:
        return StoredFile(name=self.path.name, bytes=self.length, sha256=self._digest.hexdigest())


def lock_folder(folder: Path) -> io.FileIO:
    """An open file that holds the folder until it is closed, also by the process's death."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(folder / LOCK, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder} is being written by another prepare; wait for it or stop it") from None
    except OSError:
        pass  # a network folder that knows no locks
    return file
