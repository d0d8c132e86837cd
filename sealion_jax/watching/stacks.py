"""The stacks of all of a process's threads, whatever the threads are stuck in."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import time
from pathlib import Path

_MOST_BYTES = 1 << 20


class StacksFile:
    """Where this process writes its stacks: on its own machine, and opened beforehand.

    A process that is hung may not be able to open anything, least of all on the storage that hangs. The file
    has no name, so nothing is left of it when the process is killed.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` closes it)
        except OSError:  # no room, which is no reason not to train
            self._file = open(os.devnull, "w+")  # noqa: SIM115
        self.descriptor = self._file.fileno()
        self._is_armed = False

    def dump(self, title: str) -> bytes:
        """Adds the stacks of all threads as they are now; returns all that was written up to now."""
        print(f"{title}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file, all_threads=True)
        print(file=self._file, flush=True)
        return os.pread(self.descriptor, _MOST_BYTES, 0)

    def rearm(self, seconds: float) -> None:
        """Has the stacks written in so many seconds unless this is called again before.

        A thread of C does that. So it also works where no Python thread can run, because one of them holds
        the interpreter's lock and does not let go of it: the one hang in which `dump` cannot be called.
        """
        faulthandler.dump_traceback_later(seconds, file=self._file)
        self._is_armed = True

    def disarm(self) -> None:
        """Ends what `rearm` began."""
        if self._is_armed:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Removes the file."""
        self.disarm()
        with contextlib.suppress(OSError):
            self._file.close()


def stacks_of_other(pid: int, descriptor: int) -> bytes:
    """What another process of this machine wrote to its StacksFile; nothing where that cannot be read."""
    try:
        with Path(f"/proc/{pid}/fd/{descriptor}").open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return b""


def dump_to_stderr() -> None:
    """Writes the stacks of all threads where errors go, when there is no file to be had."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
