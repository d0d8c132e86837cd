"""What a process is doing, since when, and how long that may take; no threads, no files."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from sealion_jax.watching.config import WatchConfig

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

READING = ", reading a batch"
"""Behind what is done while a batch is waited for."""

_STEPS = 50
"""Times of so many of the last steps are kept for the median."""
_ENOUGH_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Doing:
    """One piece of work."""

    what: str
    """As people read it: "restoring", "step 12"."""
    is_step: bool
    since: float
    """When it began, on the clock of the activity, or last moved on."""


class Clock:
    """Seconds in which this process was awake: stands still while it is stopped, or the machine sleeps.

    Told by being looked at often: a gap counts for `longest_gap_seconds` at most. So a process that is
    continued after an hour does not take itself, or another, to have been hung for that hour.
    """

    def __init__(self, monotonic: Callable[[], float], *, longest_gap_seconds: float) -> None:
        self._monotonic = monotonic
        self._longest = longest_gap_seconds
        self._seen = monotonic()
        self._counted = 0.0

    def tick(self) -> float:
        """The time now; called by one thread alone."""
        now = self._monotonic()
        self._counted, self._seen = self._counted + min(now - self._seen, self._longest), now
        return self._counted

    def now(self) -> float:
        """The time now, by any thread."""
        return self._counted + min(self._monotonic() - self._seen, self._longest)


class Activity:
    """What this process is doing; told by the thread that does it, read by those that watch.

    What is read together is replaced in one assignment, so no lock is held while a step is timed.
    """

    def __init__(self, config: WatchConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._times: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self.step: int | None = None
        """Steps done; None before training."""
        self.lease: int | None = None
        """The number of the lease by which the run has its directory; None before, and then a process alone
        writes no heartbeat."""
        self.moves = 0
        """Grows with all that is begun, or moves on."""
        self.listener: Callable[[Doing], None] = lambda doing: None
        """Called with what is done from now on, by the thread that does it."""
        self._doing = Doing(what="starting", is_step=False, since=clock.now())

    @property
    def doing(self) -> Doing:
        """What is being done."""
        return self._doing

    @doing.setter
    def doing(self, doing: Doing) -> None:
        self._doing = doing
        self.listener(doing)

    def begin(self, what: str, *, step: int | None = None) -> None:
        """From now on this is done, which has no median; after `step` steps, where that is known by now."""
        if step is not None:
            self.step = step
        self.moves += 1
        self.doing = Doing(what=what, is_step=False, since=self._clock.now())

    def move_on(self) -> None:
        """What is done goes on, and is not stuck: its time begins anew."""
        before = self.doing
        self.moves += 1
        self.doing = Doing(what=before.what, is_step=before.is_step, since=self._clock.now())

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """While the block runs this is done; then what was done before, whose time begins anew."""
        before = self.doing
        self.begin(what)
        try:
            yield
        finally:
            self.doing = before
            self.move_on()

    def noted(self, what: str, work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function `work`; while it runs, `what` is being done."""

        def noting(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.during(what):
                return work(*args, **kwargs)

        return noting

    def finished_step(self, step: int) -> None:
        """The numbers of so many steps are known; the next one is under way."""
        now, before = self._clock.now(), self.doing
        if before.is_step:
            self._times.append(now - before.since)
        self.step = step
        self.moves += 1
        self.doing = Doing(what=f"step {step + 1}", is_step=True, since=now)

    def stepping(self, update: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function that computes a step; once it has returned, the first step too is one like the others.

        It returns when it has compiled, and devices compute: a step that hangs then, hangs in no compiler.
        """

        def updating(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            result = update(*args, **kwargs)
            if not self.doing.is_step:
                what = f"step {(self.step or 0) + 1}"
                self.doing = Doing(what=what, is_step=True, since=self._clock.now())
            return result

        return updating

    def reading(self, batches: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The same batches; while one is waited for, that is what the process is doing.

        The time of the step goes on, of which waiting for its batch is a part.
        """
        while True:
            before = self.doing
            self.doing = dataclasses.replace(before, what=f"{before.what}{READING}")
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.doing = before
            yield batch

    @property
    def median_seconds(self) -> float | None:
        """Of the last steps; None while there are too few to tell."""
        times = list(self._times)
        return statistics.median(times) if len(times) >= _ENOUGH_STEPS else None

    def limit_seconds(self, doing: Doing) -> float | None:
        """How long this piece of work may take; None for as long as it likes."""
        least, median = self._config.least_seconds, self.median_seconds
        if not doing.is_step:
            return self._config.phase_seconds
        if least is None:
            return None
        return least if median is None else max(least, self._config.hang_factor * median)

    def overdue(self) -> str | None:
        """What to say of work that takes longer than it may; None if nothing does."""
        doing = self.doing
        taken, limit = self._clock.now() - doing.since, self.limit_seconds(doing)
        if limit is None or taken < limit:
            return None
        median = self.median_seconds
        usual = f"; the median of the last steps is {median:.3g} s" if doing.is_step and median else ""
        return f"{doing.what} has taken {taken:.0f} s, and may take {limit:.0f} s{usual}"
