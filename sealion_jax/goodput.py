"""Where a run's wall time went, over all the processes that trained it one after another.

Every start of a run is a session; its first process keeps an account in `<run>/goodput/<session>.json`, which
is written every few seconds from when the run directory is its own. Goodput is the share of the wall time,
from the first session's start to now, that steps took whose result is in the weights: time to start, to
compile, to wait for data, to evaluate and to save is none, nor are steps that were lost because a session
ended before the next save, nor the time between sessions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sealion_jax.config_tree import from_plain
from sealion_jax.storage import file_system, remove, write_whole

FOLDER = "goodput"
STEPS = "steps"
LOST = "lost steps"
BETWEEN = "between sessions"
KINDS: tuple[str, ...] = (
    STEPS,
    LOST,
    "start",
    "restore",
    "compile",
    "data",
    "evaluation",
    "save",
    "other",
    BETWEEN,
)
"""In the order in which they are told."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """The account of one session."""

    started_at: float
    """Seconds since 1970, as `updated_at`."""
    updated_at: float
    began_after: tuple[int, ...] = ()
    """Steps that were done when training began; several where the session itself went back."""
    reached: tuple[int, ...] = ()
    """Steps that were done at last, of each of these stretches."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By kind, all that passed."""

    def __post_init__(self) -> None:
        if len(self.began_after) != len(self.reached) or any(
            map(operator.gt, self.began_after, self.reached)
        ):
            raise ValueError(f"stretches that began after steps {self.began_after} reached {self.reached}")
        if not all(map(math.isfinite, (self.started_at, self.updated_at, *self.seconds.values()))):
            raise ValueError("times that are not finite")


class Ledger:
    """The account of the session that goes on; one thread tells what it does, another writes it."""

    def __init__(
        self,
        name: str = "session",
        *,
        started_at: float | None = None,
        now: Callable[[], float] = time.time,
        every_seconds: float = 10.0,
    ) -> None:
        """
        Args:
            name: of the session, and of its file.
            started_at: when the session began, if that was before now.
        """
        self._now = now
        self._name = name
        self._every_seconds = every_seconds
        self._lock = threading.Lock()
        self._since = now()
        self._kind = "start"
        started = self._since if started_at is None else started_at
        self._session = Session(started_at=started, updated_at=self._since)
        self._seconds = {"start": self._since - started}
        self._earlier: tuple[Session, ...] = ()
        self._is_void = False

    @contextlib.contextmanager
    def kept(self, run_dir: Path, *, earlier: Sequence[Session]) -> Iterator[None]:
        """While the block runs the account is written to the run directory: at once, in turns, at the end.

        A disk that does not take it stops no run; it does so where there is no room for a checkpoint.

        Args:
            earlier: sessions, which this one follows.
        """
        self._earlier = tuple(earlier)
        place, ending = run_dir / FOLDER / f"{self._name}.json", threading.Event()

        def write() -> None:
            with contextlib.suppress(OSError):
                write_whole(place, json.dumps(dataclasses.asdict(self.sessions[-1])).encode())

        def write_in_turns() -> None:
            while not ending.wait(self._every_seconds):
                write()

        write()
        thread = threading.Thread(target=write_in_turns, name="goodput", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
            if self._is_void:
                remove(place)
            else:
                write()

    def found_nothing_to_do(self) -> None:
        """Leaves no account of this session: neither it nor the time before it was the run's."""
        self._is_void = True

    def turn_to(self, kind: str) -> None:
        """What passes from now on is of this kind."""
        with self._lock:
            now = self._now()
            self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + now - self._since
            self._kind, self._since = kind, now

    def begin(self, step: int) -> None:
        """Training begins, or begins again, with so many steps done."""
        with self._lock:
            before = self._session
            self._session = dataclasses.replace(
                before, began_after=(*before.began_after, step), reached=(*before.reached, step)
            )

    def finished_step(self, step: int) -> None:
        """So many steps are done."""
        with self._lock:
            self._session = dataclasses.replace(self._session, reached=(*self._session.reached[:-1], step))

    @property
    def sessions(self) -> list[Session]:
        """All of the run, this one last, as of now."""
        with self._lock:
            now = self._now()
            seconds = self._seconds | {self._kind: self._seconds.get(self._kind, 0.0) + now - self._since}
            return [*self._earlier, dataclasses.replace(self._session, updated_at=now, seconds=seconds)]


def read_sessions(
    run_dir: object, *, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> list[Session]:
    """The sessions of a run, the first to start first; files that are damaged are reported and left out."""
    system, folder = file_system(f"{str(run_dir).rstrip('/')}/{FOLDER}")
    try:
        paths = system.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    sessions = []
    for path in paths:
        if not path.endswith(".json"):
            continue
        try:
            sessions.append(from_plain(json.loads(system.cat_file(path)), Session))
        except (OSError, ValueError) as error:
            report(f"the account of time {path} is damaged, and left out: {error}")
    return sorted(sessions, key=lambda session: session.started_at)


def account(sessions: Sequence[Session]) -> dict[str, float]:
    """Seconds of every kind in KINDS, over sessions in the order of their starts.

    A session's steps cost the same each, so those after a step that a later stretch began with are lost in
    proportion.
    """
    totals: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for session in sessions:
        for kind, seconds in session.seconds.items():
            totals[kind if kind in totals else "other"] += seconds
    kept = math.inf  # steps up to here are trained again by no later stretch
    for session in reversed(sessions):
        done = lost = 0
        for first, last in zip(reversed(session.began_after), reversed(session.reached), strict=True):
            done += last - first
            lost += last - min(last, max(first, kept))
            kept = min(kept, first)
        if done:
            seconds = session.seconds.get(STEPS, 0.0) * lost / done
            totals[LOST] += seconds
            totals[STEPS] -= seconds
    for before, after in itertools.pairwise(sessions):
        totals[BETWEEN] += max(0.0, after.started_at - before.updated_at)
    return totals


def goodput(totals: Mapping[str, float]) -> float:
    """The share of all the time that went into steps that count; 0 where no time has passed."""
    whole = sum(totals.values())
    return totals[STEPS] / whole if whole else 0.0


def table(totals: Mapping[str, float]) -> str:
    """The account as a few lines: kind, seconds, share."""
    whole = sum(totals.values()) or 1.0
    lines = [
        f"  {kind:<{max(map(len, KINDS))}}  {totals[kind]:>10,.0f} s  {totals[kind] / whole:>6.1%}"
        for kind in KINDS
        if totals[kind] >= 0.5
    ]
    return "\n".join([f"goodput {goodput(totals):.1%} of {whole:,.0f} s", *lines])
