"""Files that grow, in a bucket, where nothing can be appended to: written here, and copied there again."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sealion_jax.storage import file_system, is_remote, remove

Stamp = tuple[int, int]
"""Size and time of change: a file with another one is copied again."""


class Mirror:
    """A folder of this machine whose files are the same in another place; used as a context manager.

    Where the other place is on a disk it is the folder, and there is nothing to copy. A bucket's is a new
    folder among this machine's temporary files, which begins with the files that are `carried` on. What
    changes in it is copied by `sync`, at the end, and from time to time by a thread of its own; what is
    removed from it is removed there.
    """

    def __init__(
        self,
        target: str,
        *,
        carried: Sequence[str] = (),
        renewed: Sequence[str] = (),
        interval_seconds: float = 30.0,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            target: a folder, local or gs://.
            carried: names of files that are read back, if they are there.
            renewed: names of folders that begin empty: what they hold in the bucket goes at the first copy.
            interval_seconds: between copies; more where a copy takes more than a tenth of it.
            may_write: asked before every copy; raises if the folder belongs to another process by now.
        """
        self.folder = Path(target)
        self._target = target.rstrip("/")
        self._carried = tuple(carried)
        self._renewed = tuple(renewed)
        self._interval_seconds = interval_seconds
        self._may_write = may_write
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._copied: dict[str, Stamp | None] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Mirror:
        if is_remote(self._target):
            self._scratch = tempfile.TemporaryDirectory(prefix="sealion-run-")
            self.folder = Path(self._scratch.name)
            self._fetch()
            self._thread = threading.Thread(target=self._copy_in_turns, name="mirror", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._scratch is None:
            return
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        try:
            # An error that is on its way already is not hidden behind that of a copy.
            with contextlib.suppress(*(() if kind is None else (Exception,))):
                self.sync()
        finally:
            self._scratch.cleanup()

    def sync(self) -> None:
        """Copies what has changed; returns when it is there. Raises what storage raises."""
        if self._scratch is None:
            return
        with self._lock:
            self._may_write()
            system, there = file_system(self._target)
            here = {str(path.relative_to(self.folder)): path for path in self._files()}
            for name, path in here.items():
                with contextlib.suppress(FileNotFoundError):  # removed or renamed at this moment
                    stamp = _stamp(path)
                    if self._copied.get(name) != stamp:
                        # Read first: a file that grows meanwhile must not end in the midst of an upload.
                        system.pipe_file(f"{there}/{name}", path.read_bytes())
                        self._copied[name] = stamp
            for name in self._copied.keys() - here.keys():
                remove(f"{self._target}/{name}")
                del self._copied[name]

    def _fetch(self) -> None:
        system, there = file_system(self._target)
        for name in self._carried:
            with contextlib.suppress(FileNotFoundError):
                content = system.cat_file(f"{there}/{name}")
                (self.folder / name).write_bytes(content)
                self._copied[name] = _stamp(self.folder / name)
        for folder in self._renewed:
            for path in system.find(f"{there}/{folder}"):
                self._copied[path[len(there) + 1 :]] = None

    def _files(self) -> list[Path]:
        # What is being written has another name first: `MetricsLog` and plots end it with .new, `write_whole`
        # begins it with a dot.
        return [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.suffix != ".new" and not path.name.startswith(".")
        ]

    def _copy_in_turns(self) -> None:
        pause = self._interval_seconds
        while not self._closing.wait(pause):
            began = time.monotonic()
            # What fails is tried again, at the latest by the next `sync`, which tells.
            with contextlib.suppress(Exception):
                self.sync()
            pause = max(self._interval_seconds, 10 * (time.monotonic() - began))


def _stamp(path: Path) -> Stamp:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
