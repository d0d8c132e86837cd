"""One writer a run directory: a second run is refused while the first one lives.

`<run>/lease/` holds one small file, named by a number that grows with every holder (the fencing token).
Taking the lease is creating the next number's file, which only one process can do, on a disk and on gs://
alike; the holder then rewrites its file every few seconds. A holder that was suspended and wakes up after
another took over finds the higher number before it commits anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from etils import epath

from sealion_jax.checkpoint.lease_files import JobStart, LeaseFiles, LeaseRecord, alive_here, describe
from sealion_jax.checkpoint.processes import on_first_process
from sealion_jax.errors import UserError

_CLOCKS = 10
"""A heartbeat so many times older than a silent holder's is believed to be old, whatever the clocks say."""


class LeaseLostError(UserError):
    """Another run has taken the run directory over; this one must not write to it any more."""


class RunLease:
    """The right to write to a run directory; used as a context manager, by every process of a run alike.

    Process 0 holds the lease for all. Entering raises UserError, on all processes, while another run holds
    it. A lease is free when it was given back, when its holder ran on this machine and is dead, or when its
    last heartbeat is older than `stale_after_seconds`. If the holder is on another machine and was heard of
    more recently, entering waits for its next heartbeat (and refuses), or takes over when none comes for
    `stale_after_seconds`.

    A scheduler that starts a job again has given its earlier start up: those processes may live on where
    their node is out of reach, and nobody else would end them. So a later start of the same job takes over at
    once, and what the earlier one tries to write is refused.

    Args:
        on_lost: called in a thread when a heartbeat finds that another run has taken over; without it the
            next `check` tells. What is being written at that moment is beyond any check, so the process had
            better end.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        *,
        start: JobStart | None = None,
        heartbeat_seconds: float = 10.0,
        stale_after_seconds: float = 60.0,
        on_lost: Callable[[LeaseLostError], None] = lambda _error: None,
        report: Callable[[str], None] = print,
    ) -> None:
        self._run_dir = str(run_dir)
        self._files = LeaseFiles(f"{self._run_dir.rstrip('/')}/lease")
        self._start = start
        self._heartbeat_seconds = heartbeat_seconds
        self._stale_after_seconds = stale_after_seconds
        self._on_lost = on_lost
        self._report = report
        self._owner = uuid.uuid4().hex
        self._record: LeaseRecord | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLease:
        on_first_process(self._acquire)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def token(self) -> int | None:
        """The fencing token; None where no lease is held (and on processes other than 0)."""
        return self._record.token if self._record else None

    def check(self) -> None:
        """Raises LeaseLostError if another run has taken over; does nothing on processes other than 0."""
        if self._record is None:
            return
        newest = self._files.newest()
        if newest is not None and self._is_of_another(newest, self._record):
            own = f"pid {os.getpid()} on {socket.gethostname()}"
            taken = f"{self._run_dir} was taken over by {describe(newest)}"
            if self._is_of_later_start(newest):
                raise LeaseLostError(
                    f"{taken}, a later start of this job; this one ({own}) was given up by the scheduler "
                    "and writes nothing more"
                )
            raise LeaseLostError(
                f"{taken} while this run ({own}) gave no sign of life; nothing more is written. Stop one of "
                "the two"
            )

    def release(self) -> None:
        """Gives the lease back, so that the next run need not wait."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        if self._record is not None:
            with contextlib.suppress(Exception):  # on a full disk the end of the process says as much
                newest = self._files.newest()
                if newest is not None and newest.owner == self._record.owner:
                    self._files.overwrite(dataclasses.replace(self._record, released=True))
            self._record = None

    def _acquire(self) -> None:
        """Takes the lease and starts its heartbeat, or raises UserError."""
        if self._record is not None:
            raise RuntimeError(f"this RunLease of {self._run_dir} is held already")
        watch: _Watch | None = None
        while self._record is None:
            current = self._files.newest()
            if current is not None and self._is_of_later_start(current):
                raise UserError(
                    f"{self._run_dir} was taken over by {describe(current)}, a later start of this very job; "
                    "this start was given up by the scheduler and must end"
                )
            given_up = current if current is not None and self._is_given_up(current) else None
            if current is None or self._is_free(current) or given_up or (watch and watch.expired(current)):
                self._record = self._files.create(
                    1 if current is None else current.token + 1, owner=self._owner, start=self._start
                )
                if self._record is not None and given_up is not None and not given_up.released:
                    self._report(
                        f"{self._run_dir} is taken over from {describe(given_up)}, which belongs to an "
                        "earlier start of this job"
                    )
                if self._record is None:  # another was faster: see who
                    time.sleep(0.05)
                continue
            if alive_here(current) or (watch and watch.heard_of(current)):
                raise UserError(
                    f"{self._run_dir} is in use by {describe(current)}. Wait for it or stop it, or give "
                    "another --run-dir"
                )
            if watch is None:
                watch = _Watch(current, self._stale_after_seconds)
                self._report(
                    f"{self._run_dir} was last used by {describe(current)}; taking it over in "
                    f"{self._stale_after_seconds:.0f} s unless that run shows a sign of life"
                )
            time.sleep(min(1.0, self._heartbeat_seconds / 4))
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lease", daemon=True)
        self._thread.start()

    @staticmethod
    def _is_of_another(newest: LeaseRecord, own: LeaseRecord) -> bool:
        # Two hold the same number where somebody has removed the directory under a run.
        return newest.token > own.token or (newest.token == own.token and newest.owner not in ("", own.owner))

    def _is_free(self, record: LeaseRecord) -> bool:
        # Of another machine's clock only so much is believed: one that is minutes off must not cost a run.
        silent_for = time.time() - record.heartbeat_at
        return (
            record.released or alive_here(record) is False or silent_for > _CLOCKS * self._stale_after_seconds
        )

    def _is_given_up(self, record: LeaseRecord) -> bool:
        """Whether the holder belongs to an earlier start of the scheduler's job that this run is."""
        return (
            self._start is not None
            and record.job == self._start.job
            and record.restarts < self._start.restarts
        )

    def _is_of_later_start(self, record: LeaseRecord) -> bool:
        return (
            self._start is not None
            and record.job == self._start.job
            and record.restarts > self._start.restarts
        )

    def _beat(self) -> None:
        """Renews the lease until told to stop or fenced off."""
        while not self._stop.wait(self._heartbeat_seconds):
            record = self._record
            if record is None:
                return
            try:
                self.check()
                self._record = dataclasses.replace(record, heartbeat_at=time.time())
                self._files.overwrite(self._record)
            except LeaseLostError as lost:
                self._on_lost(lost)
                return
            except Exception:  # a full disk or a network hiccup (no OSError with some stores): try again
                continue


class _Watch:
    """Looks at another machine's lease until its heartbeat moves or has stood still for long enough.

    Measured on this machine's clock alone.
    """

    def __init__(self, first_seen: LeaseRecord, patience_seconds: float) -> None:
        self._first_seen = first_seen
        self._deadline = time.monotonic() + patience_seconds

    def heard_of(self, record: LeaseRecord) -> bool:
        return record != self._first_seen

    def expired(self, record: LeaseRecord) -> bool:
        return record == self._first_seen and time.monotonic() > self._deadline
