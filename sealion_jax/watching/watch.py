"""A run's watch: threads beside training, which end the process when the run is hung.

One thread (`heartbeats`) does all that touches storage: it writes this process's heartbeat, looks for the
next process's, and speaks with the others when there is an alarm. The other (`watch`) touches none: it
measures how long things take, and ends the process, also when storage is what hangs. With several processes
a third (`ends`) asks JAX's service whether one of them has met a mistake of the user's. While the main thread
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
from sealion_jax.watching.ends import Ends
from sealion_jax.watching.stacks import StacksFile, dump_to_stderr
from sealion_jax.watching.verdict import DONE, FAILED, OVERDUE, STOPPED, Alarm

_HEARD_SECONDS = 2.0
"""After so long all processes have heard of a mistake of the user's, and all but process 0 have ended."""
_ALIKE_SECONDS = 0.5
"""Who hears of one waits so long: it may be about to meet the same, and tells it best itself."""
_COUNT_SECONDS = 0.1


def to_stderr(line: str) -> None:
    """Prints a line where errors go, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Watch:
    """Watches over the process that enters it, together with the run's other processes.

    As a context manager it gives the `Activity` that is to be told what the process does. If the block ends
    with an error that is this process's own, while others may wait for it, they are told, and all end: with
    exit code 2 if it is a UserError, else with 1.
    """

    def __init__(
        self,
        run_dir: str,
        config: WatchConfig,
        *,
        process: int,
        processes: int,
        attempt: str,
        ends: Ends | None = None,
        report: Callable[[str], None] = to_stderr,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """
        Args:
            attempt: a word that the processes which were started together share, and no others.
            ends: where several processes tell each other of the user's mistakes.
            end: ends the process at once; it may be stuck where no exception reaches it.
        """
        self._config = config
        self._several = processes > 1
        self._ends = ends if self._several else None
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
            BeatFiles(run_dir, attempt),
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
        self._threads: dict[str, threading.Thread] = {}

    def __enter__(self) -> Activity:
        loops = {"heartbeats": self._beat_loop, "watch": self._watch_loop}
        if self._ends is not None:
            loops["ends"] = self._end_loop
        for name, loop in loops.items():
            self._threads[name] = threading.Thread(target=loop, name=name, daemon=True)
            self._threads[name].start()
        return self._activity

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What the user wants needs no talk: all are told, and end at the same moment. An error after another
        # process's mistake comes of that process having ended.
        if isinstance(error, UserError):
            self._refuse(error)
        elif isinstance(error, Exception) and not isinstance(error, Preempted):
            if self._several and not self._closing.is_set():
                self._end_with_the_others(error)
        elif self._ends is not None:
            with contextlib.suppress(Exception):
                self._ends.tell(None)
        self._close()
        for thread in self._threads.values():
            thread.join(timeout=longest_seconds(self._config))
        self._write_end(STOPPED if isinstance(error, Preempted) else _short(error) if error else DONE)
        self._stacks.close()

    def _end_with_the_others(self, error: Exception) -> None:
        """Tells an error, finds out with the others who is dead, and ends the process.

        It does not end by returning: JAX then waits at the exit for the others, and they for this one.
        """
        traceback.print_exception(error)
        self._council.failed = _short(error)
        # An alarm that is under way is not called off any more: it finds this process failed.
        self._council.raise_alarm(FAILED, f"process {self._beat.process} failed: {_short(error)}")
        self._threads["watch"].join()

    def end_run(self, mistake: UserError) -> None:
        """Ends the process, by any thread, and the others with it: exit code 2, and all say what is wrong."""
        if self._close():
            with contextlib.suppress(Exception):
                self._tell(mistake)
            self._leave(f"error: {mistake}")

    def _refuse(self, mistake: UserError) -> None:
        """Tells the others of the user's mistake; ends the process unless all of them end now.

        On returning it would wait for the others in JAX's exit, and they for it in a collective. What all
        raise alike, at about the same moment, is left to whoever raised it.
        """
        if self._ends is None or not self._close():
            return
        deadline = time.monotonic() + _HEARD_SECONDS
        with contextlib.suppress(Exception):  # without JAX's service nobody waits for this process either
            self._tell(mistake)
            while self._ends.count() < self._beat.processes:
                if time.monotonic() > deadline:
                    self._leave(f"error: {mistake}")
                    return
                time.sleep(_COUNT_SECONDS)

    def _tell(self, mistake: UserError) -> None:
        if self._ends is not None:
            self._ends.tell(f"{self._beat.describe()}: {' '.join(str(mistake).split())}")

    def _end_loop(self) -> None:
        """Ends the process when another has met a mistake of the user's."""
        assert self._ends is not None
        while not self._closing.wait(self._tick_seconds):
            mistake = self._ends.mistake()
            if mistake is not None:
                time.sleep(_ALIKE_SECONDS)
                if self._close():
                    self._leave(f"error: {mistake}")

    def _close(self) -> bool:
        """Has the threads come to their end; False if they had to before."""
        with self._lock:
            before = self._closing.is_set()
            self._closing.set()
        self._council.wake()
        self._council.news.set()
        return not before

    def _leave(self, line: str) -> None:
        """Ends the process with the user's mistake; process 0 last, for JAX ends the others when it goes."""
        self._report(line)
        told = threading.Thread(target=self._write_end, args=(line,), name="last heartbeat", daemon=True)
        told.start()  # which storage may hold up
        told.join(_ALIKE_SECONDS)
        if self._ends is not None and self._beat.process == 0:
            time.sleep(_HEARD_SECONDS + 2 * _ALIKE_SECONDS)
        self._finish(2)

    def _write_end(self, ended: str) -> None:
        """Writes the last heartbeat, once no other is on its way."""
        self._threads["heartbeats"].join(timeout=longest_seconds(self._config))
        with contextlib.suppress(Exception):  # storage may be what failed
            self._council.write(ended=ended)

    def _finish(self, code: int) -> None:
        """Ends the process, with all that it has said."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._end(code)

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
            self._finish(1)
        return True


def _short(error: BaseException) -> str:
    """ "ValueError: what it says", on one line of reasonable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."
