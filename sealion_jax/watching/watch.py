"""A run's watch: two threads beside training, which end the process when the run is hung.

One thread (`heartbeats`) does all that touches storage: it writes this process's heartbeat, looks for the
next process's, and speaks with the others when there is an alarm. The other (`watch`) touches none: it
measures how long things take, and ends the process, also when storage is what hangs. While the main thread
waits inside XLA or a system call it holds no lock that Python's threads need, so both go on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from sealion_jax.errors import Preempted, UserError
from sealion_jax.machine import process_start, this_machine
from sealion_jax.watching.activity import Activity, Clock
from sealion_jax.watching.beats import Beat, BeatFiles
from sealion_jax.watching.config import WatchConfig
from sealion_jax.watching.council import Council, longest_seconds
from sealion_jax.watching.stacks import StacksFile, dump_to_stderr
from sealion_jax.watching.verdict import DONE, FAILED, OVERDUE, STOPPED, Alarm


def to_stderr(line: str) -> None:
    """Prints a line where errors go, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Watch:
    """Watches over the process that enters it, together with the run's other processes.

    As a context manager it gives the `Activity` that is to be told what the process does. If the block ends
    with an error that is this process's own, while others may wait for it, they are told, and all end.
    """

    def __init__(
        self,
        run_dir: str,
        config: WatchConfig,
        *,
        process: int,
        processes: int,
        attempt: str,
        report: Callable[[str], None] = to_stderr,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """
        Args:
            attempt: a word that the processes which were started together share, and no others.
            end: ends the process at once; it may be stuck where no exception reaches it.
        """
        self._config = config
        self._several = processes > 1
        self._report = report
        self._end = end
        self._tick_seconds = min(1.0, config.beat_seconds / 2)
        self._clock = Clock(time.monotonic, longest_gap_seconds=2 * config.beat_seconds)
        self._activity = Activity(config, self._clock)
        self._stacks = StacksFile()
        now = time.time()
        self._beat = Beat(
            attempt=attempt,
            process=process,
            processes=processes,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=this_machine(),
            process_start=process_start(os.getpid()) or "",
            started_at=now,
            doing=self._activity.doing.what,
            step=None,
            progress_at=now,
            moves=0,
            beat=0,
            beat_at=now,
            beat_seconds=config.beat_seconds,
            stacks_descriptor=self._stacks.descriptor,
        )
        self._council = Council(
            BeatFiles(run_dir),
            config,
            run_dir=run_dir,
            first=self._beat,
            activity=self._activity,
            clock=self._clock,
            stacks=self._stacks,
            report=report,
        )
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Activity:
        for name, loop in (("heartbeats", self._beat_loop), ("watch", self._watch_loop)):
            self._threads.append(threading.Thread(target=loop, name=name, daemon=True))
            self._threads[-1].start()
        return self._activity

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What all processes raise alike, and what the user wants, needs no talk: the heartbeat tells it.
        if self._several and isinstance(error, Exception) and not isinstance(error, UserError | Preempted):
            self._end_with_the_others(error)
        with self._lock:
            self._closing.set()
        self._council.wake()
        self._council.news.set()
        for thread in self._threads:
            thread.join(timeout=longest_seconds(self._config))
        ended = STOPPED if isinstance(error, Preempted) else _short(error) if error else DONE
        with contextlib.suppress(Exception):  # storage may be what failed, and the error is on its way
            self._council.write(ended=ended)
        self._stacks.close()

    def _end_with_the_others(self, error: Exception) -> None:
        """Tells an error, finds out with the others who is dead, and ends the process.

        It does not end by returning: JAX then waits at the exit for the others, and they for this one.
        """
        traceback.print_exception(error)
        self._council.failed = _short(error)
        # An alarm that is under way is not called off any more: it finds this process failed.
        self._council.raise_alarm(FAILED, f"process {self._beat.process} failed: {_short(error)}")
        self._threads[-1].join()

    def _beat_loop(self) -> None:
        """Writes heartbeats and looks at the neighbour; when there is an alarm, settles it."""
        while not self._closing.is_set():
            with contextlib.suppress(Exception):  # whatever storage raises: the next beat tries again
                self._council.beat(closing=self._closing)
            self._council.rest()

    def _watch_loop(self) -> None:
        """Measures, and ends the process when an alarm is not called off."""
        while not self._closing.is_set():
            self._council.news.wait(self._tick_seconds)
            self._council.news.clear()
            self._clock.tick()
            late = self._activity.overdue()
            if late is not None:
                self._council.raise_alarm(OVERDUE, f"process {self._beat.process}: {late}")
            alarm = self._council.alarm
            if alarm is not None and self._settled(alarm):
                return

    def _settled(self, alarm: Alarm) -> bool:
        """Waits for what the processes conclude; True when this one has been ended, or is ending anyway."""
        deadline = time.monotonic() + longest_seconds(self._config)
        while self._council.alarm is not None and time.monotonic() < deadline:
            if self._closing.wait(self._tick_seconds / 4):
                return True
            self._clock.tick()
            if self._council.verdict is not None:
                break
        else:
            if self._council.alarm is None:
                return False  # called off
        with self._lock:
            if self._closing.is_set():
                return True
            if self._council.verdict is None:
                self._report(f"ending the run: {alarm.reason}; and the run directory does not answer")
                dump_to_stderr()
            else:
                with contextlib.suppress(Exception):
                    self._council.execute()
                self._stacks.close()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            self._end(1)
        return True


def _short(error: BaseException) -> str:
    """ "ValueError: what it says", on one line of reasonable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."
