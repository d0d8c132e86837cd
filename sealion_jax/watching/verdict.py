"""What the processes of a run conclude from their heartbeats: who is silent, who is behind; no files."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sealion_jax.machine import is_stopped, lives_here
from sealion_jax.watching.beats import Beat

DONE = "done"
STOPPED = "stopped"
GOOD_ENDS = (DONE, STOPPED)

OVERDUE = "overdue"
SILENT = "silent"
FAILED = "failed"

_SHOWN = 8
"""Of the processes that answer so many are named, those that are behind first."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Why the processes of a run look at each other."""

    kind: str
    """OVERDUE, SILENT or FAILED."""
    by: int
    """The process that raised it."""
    reason: str
    moves: int
    """That process's count of what it has begun, then."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The processes of an attempt, once all had time to answer."""

    heard: Mapping[int, Beat]
    """Those that live, or ended and said so."""
    silent: Mapping[int, Beat | None]
    """The others, with the last that is known of them; None of one that was never heard of."""

    @property
    def processes(self) -> int:
        """How many there are."""
        return len(self.heard) + len(self.silent)

    @property
    def running(self) -> list[int]:
        """Those that live, in order."""
        return sorted(process for process, beat in self.heard.items() if beat.ended is None)


def is_dead_here(beat: Beat) -> bool:
    """Whether the process ran on this machine, and does not any more."""
    return lives_here(machine=beat.machine, pid=beat.pid, start=beat.process_start) is False


def can_be_killed_here(beat: Beat) -> bool:
    """Whether it surely is this process that the pid means, and on this machine."""
    if not beat.process_start or beat.pid <= 1:
        return False
    return lives_here(machine=beat.machine, pid=beat.pid, start=beat.process_start) is True


def is_called_off(alarm: Alarm, findings: Findings) -> bool:
    """Whether it was nothing: who was silent answers, or what took long has moved on since."""
    failed = [beat for beat in findings.heard.values() if beat.ended not in (None, *GOOD_ENDS)]
    if findings.silent or failed or alarm.kind == FAILED:
        return False
    if alarm.kind == SILENT:
        return True
    return findings.heard[alarm.by].moves != alarm.moves


def behind(beats: Sequence[Beat]) -> list[Beat]:
    """Of processes that live, those for which the others seem to wait; empty where nothing tells them apart.

    Those with the fewest steps done; with equal numbers, those that do something else than most.
    """
    steps = {beat.step if beat.step is not None else -1 for beat in beats}
    if len(steps) > 1:
        return [beat for beat in beats if (beat.step if beat.step is not None else -1) == min(steps)]
    counts = collections.Counter(beat.doing for beat in beats)
    (_, most), *others = counts.most_common() or [("", 0)]
    if not others or others[0][1] == most:
        return []
    return [beat for beat in beats if counts[beat.doing] < most]


def verdict_of(alarm: Alarm, findings: Findings, *, run_dir: str) -> dict[str, Any]:
    """The verdict as it is written down: what `hangs.jsonl` has of it, and the lines that people read."""
    lines = [f"ending the run: {alarm.reason}"]
    for process, beat in sorted(findings.silent.items()):
        lines.append(f"  {_silent_line(process, beat)}")
    waiting = [findings.heard[process] for process in findings.running]
    late = behind(waiting)
    shown = [*late, *(beat for beat in waiting if beat not in late)][:_SHOWN]
    for beat in sorted(shown, key=lambda beat: beat.process):
        mark = " <- the others seem to wait for this one" if beat in late else ""
        lines.append(
            f"  {beat.describe()}: in {beat.doing} for {max(0.0, beat.beat_at - beat.progress_at):.0f} s; "
            f"stacks in {beat.stacks}{mark}"
        )
    if len(waiting) > len(shown):
        lines.append(f"  and {len(waiting) - len(shown)} more that answer")
    for _, beat in sorted(findings.heard.items()):
        if beat.ended is not None:
            lines.append(f"  {beat.describe()}: ended ({beat.ended})")
    if findings.processes > 1:
        verb = "does" if len(findings.silent) == 1 else "do"
        lines.append(
            f"{len(findings.silent)} of {findings.processes} processes {verb} not answer; all end now"
        )
    lines.append(f"run the same command again: it goes on from the newest checkpoint in {run_dir}")
    return {
        "time": time.time(),
        "kind": alarm.kind,
        "by": alarm.by,
        "reason": alarm.reason,
        "silent": sorted(findings.silent),
        "behind": [beat.process for beat in late],
        "processes": {
            str(process): None
            if beat is None
            else {"host": beat.host, "pid": beat.pid, "doing": beat.doing, "step": beat.step}
            for process, beat in sorted({**findings.heard, **findings.silent}.items())
        },
        "lines": lines,
    }


def _silent_line(process: int, beat: Beat | None) -> str:
    if beat is None:
        return f"process {process}: was never heard of"
    last = f"does not answer; last seen in {beat.doing}"
    here = lives_here(machine=beat.machine, pid=beat.pid, start=beat.process_start)
    if here is None:
        return f"{beat.describe()}: {last}; only from its own machine can it be killed"
    if not here:
        return f"{beat.describe()}: is dead; last seen in {beat.doing}"
    stopped = ", and is stopped (SIGSTOP)" if is_stopped(beat.pid) else ""
    return f"{beat.describe()}: {last}{stopped}; killing it"
