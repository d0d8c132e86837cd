"""The stacks of all of a process's threads, whatever the threads are stuck in."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from sealion_jax.machine import is_stopped

_MOST_BYTES = 1 << 20
_SIGNAL = signal.SIGRTMIN + 7
"""Has a process write its stacks; none that schedulers send, or that people use."""


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
        faulthandler.register(_SIGNAL, file=self._file, all_threads=True)

    def dump(self, title: str) -> bytes:
        """Adds the stacks of all threads as they are now; returns all that was written up to now."""
        print(f"{title}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file, all_threads=True)
        print(file=self._file, flush=True)
        return os.pread(self.descriptor, _MOST_BYTES, 0)

    def close(self) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):
            faulthandler.unregister(_SIGNAL)
            self._file.close()


def stacks_of_other(pid: int, descriptor: int) -> bytes:
    """The stacks of another process of this machine, which has a StacksFile; nothing where it is stopped.

    It writes them in a signal handler of C. So this also works where no Python thread can run, because one of
    them holds the interpreter's lock and does not let go of it. That may end the process, if its threads do
    run after all: only for one that is killed next.
    """
    path = Path(f"/proc/{pid}/fd/{descriptor}")
    try:
        if not is_stopped(pid):
            os.kill(pid, _SIGNAL)
            _wait_for_lines(path)
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return b""


def _wait_for_lines(path: Path) -> None:
    """Waits until the file has grown and grows no more, or a second has passed."""
    sizes = [path.stat().st_size]
    for _ in range(20):
        time.sleep(0.05)
        sizes.append(path.stat().st_size)
        if sizes[-1] == sizes[-2] > sizes[0]:
            return


def dump_to_stderr() -> None:
    """Writes the stacks of all threads where errors go, when there is no file to be had."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
