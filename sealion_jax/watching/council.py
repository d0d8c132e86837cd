"""What the processes of a run tell each other when something is wrong, through files, and what they decide.

Each looks at the heartbeat of the next one, in a ring, so what is read grows with the number of processes
and not with its square. Whoever finds something wrong writes an alarm. All that live hear of it, dump their
stacks and answer in their heartbeats. The lowest of them writes a verdict, which all follow: it is called
off, or the silent ones are killed where they can be, and all end. Nothing is told by comparing two machines'
clocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from sealion_jax.config_tree import from_plain
from sealion_jax.errors import UserError
from sealion_jax.watching.activity import Activity, Clock
from sealion_jax.watching.beats import Beat, BeatFiles
from sealion_jax.watching.config import WatchConfig
from sealion_jax.watching.ending import execute
from sealion_jax.watching.stacks import StacksFile
from sealion_jax.watching.verdict import (
    GOOD_ENDS,
    SILENT,
    Alarm,
    Findings,
    is_called_off,
    is_dead_here,
    verdict_of,
)

_LOOKS = 3
"""A process that lives answers within so many heartbeats."""
_VERDICT_LOOKS = _LOOKS + 3
"""The others wait so many for the verdict of the lowest one,"""
_READING_SECONDS = 10.0
"""and so much longer, in which it reads the heartbeats of 1,024 processes four times."""
_LOWEST = 8
"""So many of the lowest processes each process looks at first: not every one at all that are below it."""

_AWAY_BEATS = 5
"""A process that wrote no heartbeat for so many looks first whether another has its place."""


def longest_seconds(config: WatchConfig) -> float:
    """How long it takes at most from an alarm to what follows from it, if storage answers."""
    return (1 + _VERDICT_LOOKS + _LOOKS + 1) * config.beat_seconds + 2 * _READING_SECONDS


class Council:
    """One process's seat; `beat` and what it calls run in one thread, which may wait for storage."""

    def __init__(
        self,
        files: BeatFiles,
        config: WatchConfig,
        *,
        run_dir: str,
        first: Beat,
        activity: Activity,
        clock: Clock,
        stacks: StacksFile,
        report: Callable[[str], None],
    ) -> None:
        self._files = files
        self._config = config
        self._run_dir = run_dir
        self._beat = first
        self._activity = activity
        self._clock = clock
        self._stacks = stacks
        self._report = report
        self._wake = threading.Event()
        self._settled_alarms = 0
        self._neighbour = (first.process + 1) % first.processes
        self._neighbours_beat: int | None = None
        self._looks = 0
        self._is_tidy = False
        self._beat_at = time.monotonic()
        self._wrote_verdict = False
        self.news = threading.Event()
        """Set when there may be an alarm or a verdict."""
        self.alarm: Alarm | None = None
        """What is being settled; None while all is well."""
        self.verdict: dict[str, Any] | None = None
        """What follows from the alarm, once that is that all end."""
        self.failed: str | None = None
        """The error that this process ends with, while it still answers."""

    def raise_alarm(self, kind: str, reason: str) -> None:
        """Has the processes look at each other, unless they do already; by any thread."""
        if self.alarm is None:
            own = self._beat.process
            self.alarm = Alarm(kind=kind, by=own, reason=reason, moves=self._activity.moves)
            self.wake()

    def wake(self) -> None:
        """Has the next heartbeat come at once; by any thread."""
        self._wake.set()

    def rest(self) -> None:
        """Waits until the next heartbeat is due."""
        self._wake.wait(self._config.beat_seconds)
        self._wake.clear()

    def write(self, *, ended: str | None = None) -> None:
        """Writes this process's heartbeat."""
        now, doing = time.time(), self._activity.doing
        self._beat = dataclasses.replace(
            self._beat,
            doing=doing.what,
            step=self._activity.step,
            progress_at=now - (self._clock.now() - doing.since),
            moves=self._activity.moves,
            beat=self._beat.beat + 1,
            beat_at=now,
            lease=self._activity.lease,
            ended=ended or self.failed,
        )
        # A recipe with a mistake, and a run that is refused, leave nothing behind. Of several processes each
        # must be heard of from the start.
        if self._activity.lease is not None or self._beat.processes > 1:
            self._files.write(self._beat)

    def beat(self, *, closing: threading.Event) -> None:
        """Writes the heartbeat, and looks whether something is wrong; if so, settles it with the others."""
        was_away, self._beat_at = time.monotonic() - self._beat_at, time.monotonic()
        # Whether it may have the run directory, where it has not, the lease will tell.
        lease = self._activity.lease
        was_long_away = was_away > _AWAY_BEATS * self._config.beat_seconds
        if was_long_away and lease is not None and self._files.is_replaced(lease):
            self.alarm = Alarm(kind=SILENT, by=self._beat.process, reason="replaced", moves=0)
            self.verdict = {"lines": [f"{self._beat.describe()} was stopped, and the run went on without it"]}
            self.news.set()
            return
        self.write()
        if self._beat.processes > 1:
            self._tidy()
            if self.alarm is None:
                self.alarm = self._heard_alarm() or self._look_at_neighbour()
        if self.alarm is not None and self.verdict is None and not closing.is_set():
            self.news.set()
            self._settle(self.alarm, closing)

    def execute(self) -> None:
        """Says what was decided, and kills the silent processes of this machine."""
        assert self.verdict is not None
        execute(
            self.verdict,
            own=self._beat,
            files=self._files,
            wrote_it=self._wrote_verdict,
            run_dir=self._run_dir,
            report=self._report,
        )

    def _tidy(self) -> None:
        """Once, on the first process, when it holds the run directory: removes what other attempts left."""
        if self._is_tidy or self._beat.process > 0 or self._activity.lease is None:
            return
        self._is_tidy = True
        self._files.remove_others()

    def _heard_alarm(self) -> Alarm | None:
        plain = self._files.note(self._name("alarm"))
        try:
            return None if plain is None else from_plain(plain, Alarm)
        except UserError:
            return None

    def _look_at_neighbour(self) -> Alarm | None:
        """An alarm if the next process is dead, or was not heard of for too long while this one waits.

        Silence is counted in looks: where storage stands still for all, nobody looks, and nobody is accused.
        """
        beat = self._files.read(self._neighbour)
        if beat is not None and beat.ended in GOOD_ENDS:
            self._looks = 0
            return None
        number = None if beat is None else beat.beat
        self._looks = self._looks + 1 if number == self._neighbours_beat else 0
        self._neighbours_beat = number
        who = f"process {self._neighbour}" if beat is None else beat.describe()
        if beat is not None and beat.ended is None and is_dead_here(beat):
            again = self._files.read(self._neighbour)  # it may have ended well a moment ago
            if again is not None and again.ended is None:
                return self._alarm(f"{who} is dead")
        allowed = self._config.silent_seconds
        waited = self._clock.now() - self._activity.doing.since
        silence = self._looks * self._config.beat_seconds
        if allowed is None or silence < allowed or waited < allowed:
            return None
        ended = f", after it ended with {beat.ended}" if beat is not None and beat.ended else ""
        return self._alarm(
            f"{who} was not heard of for {silence:.0f} s{ended}, and {self._activity.doing.what} waits"
        )

    def _alarm(self, reason: str) -> Alarm:
        return Alarm(kind=SILENT, by=self._beat.process, reason=reason, moves=self._activity.moves)

    def _settle(self, alarm: Alarm, closing: threading.Event) -> None:
        """Answers the alarm, and finds or waits for the verdict."""
        number = self._settled_alarms + 1
        several = self._beat.processes > 1
        known = self._files.note(self._name("verdict")) if several else None
        if known is not None and self._beat.process in known.get("silent", []):
            self.verdict = known  # this process was stopped, and all has come to an end meanwhile
            self.news.set()
            return
        if several:
            # Who was first counts; of a thousand that have heard of it none tries to be.
            heard = self._heard_alarm()
            if heard is None and not self._files.note_once(self._name("alarm"), dataclasses.asdict(alarm)):
                heard = self._heard_alarm()
            self.alarm = alarm = heard or alarm
        if self._beat.alarm != number:
            stacks = self._files.keep(f"{self._beat.process}.stacks.txt", self._stacks.dump(alarm.reason))
            self._report(f"{alarm.reason}; this process's stacks are in {stacks}")
            self._beat = dataclasses.replace(self._beat, alarm=number, stacks=stacks)
        verdict = known or self._verdict(alarm, number, closing)
        if verdict is None:
            return  # this process is closing
        if verdict.get("called_off"):
            self._report(f"it was nothing: all processes answer ({alarm.reason})")
            self._settled_alarms = number
            self._looks = 0
            self.alarm = None
        else:
            self.verdict = verdict

    def _verdict(self, alarm: Alarm, number: int, closing: threading.Event) -> dict[str, Any] | None:
        """What all follow; None if this process is closing, and has nothing to do with it any more."""
        findings = self._ask(number, closing)
        if findings is None:
            allowed = _VERDICT_LOOKS * self._config.beat_seconds + _READING_SECONDS
            deadline = time.monotonic() + allowed
            while time.monotonic() < deadline:
                if closing.wait(self._config.beat_seconds / 2):
                    return None
                self.write()
                known = self._files.note(self._name("verdict"))
                if known is not None:
                    return known
            findings = self._ask(number, closing, alone=True)
        if findings is None or closing.is_set():
            return None
        called_off = is_called_off(alarm, findings)
        hang = verdict_of(alarm, findings, run_dir=self._run_dir)
        verdict = {"called_off": called_off, "written_by": self._beat.process, **hang}
        if findings.processes > 1 and not self._files.note_once(self._name("verdict"), verdict):
            verdict = self._files.note(self._name("verdict")) or verdict
        self._wrote_verdict = verdict.get("written_by") == self._beat.process
        if self._wrote_verdict and not verdict.get("called_off"):
            with contextlib.suppress(Exception):
                self._files.add_hang(hang)
        return verdict

    def _ask(self, number: int, closing: threading.Event, *, alone: bool = False) -> Findings | None:
        """Who lives, once all had time to answer; None if a lower process lives, whose word it is then.

        Args:
            alone: whatever lower ones there are, this process decides.
        """
        own = self._beat.process
        first: dict[int, int] = {}
        heard: dict[int, Beat] = {}
        last: dict[int, Beat | None] = dict.fromkeys(range(self._beat.processes))
        answered: set[int] = set()
        for look in range(_LOOKS + 1):
            if look and closing.wait(self._config.beat_seconds):
                return None
            self.write()
            # All others are of interest to the lowest alone; whether that is this one shows after two looks.
            is_all = own == 0 or look >= _LOOKS - 1 or alone
            asked = range(self._beat.processes) if is_all else range(min(own, _LOWEST))
            beats = self._files.read_many([process for process in asked if process != own])
            for process, beat in {**beats, own: self._beat}.items():
                if beat is None:
                    continue
                last[process] = beat
                if beat.alarm == number or beat.ended is not None:
                    answered.add(process)
                if process in answered or beat.beat != first.setdefault(process, beat.beat):
                    heard[process] = beat
                    if process < own and beat.ended is None and not alone:
                        return None
            if all(process in answered or (beat and is_dead_here(beat)) for process, beat in last.items()):
                break
        silent = {process: beat for process, beat in last.items() if process not in heard}
        return Findings(heard=heard, silent=silent)

    def _name(self, what: str) -> str:
        return f"{what}-{self._settled_alarms + 1}"
