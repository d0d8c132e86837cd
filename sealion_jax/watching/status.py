"""A run's heartbeats as a table for people."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from sealion_jax.watching.beats import Beat, read_all, read_hangs
from sealion_jax.watching.verdict import is_dead_here

_LATE_BEATS = 4
"""A heartbeat is late when so many should have come since."""


def status_lines(run_dir: str, *, now: float | None = None) -> list[str]:
    """A line for each process: what it does, since when, its step, and when it was last heard of.

    Ages compare this machine's clock with the process's own; where the clocks differ they are off by as much.
    Of several attempts one is told: that lives, that holds the run directory, the newest. Empty if no process
    of the run ever wrote a heartbeat.
    """
    now = time.time() if now is None else now
    beats = _of_one_attempt(read_all(run_dir), now)
    rows = [("process", "host", "pid", "step", "doing", "for", "last heartbeat")]
    rows += [_row(beat, now) for beat in beats]
    return [*_table(rows), *_last_hang(run_dir)] if beats else []


def _of_one_attempt(beats: Sequence[Beat], now: float) -> list[Beat]:
    """The heartbeats, in order, of the attempt that people ask about."""

    def rank(beat: Beat) -> tuple[bool, bool, bool, float]:
        lives = beat.ended is None and not _is_late(beat, now) and not is_dead_here(beat)
        holds = beat.lease is not None
        return lives and holds, lives, holds, beat.started_at

    attempt = max(beats, key=rank).attempt if beats else ""
    return sorted((beat for beat in beats if beat.attempt == attempt), key=lambda beat: beat.process)


def _row(beat: Beat, now: float) -> tuple[str, ...]:
    age = max(0.0, now - beat.beat_at)
    if beat.ended is not None:
        heard = f"{_age(age)} ago; ended: {beat.ended}"
    elif is_dead_here(beat):
        heard = f"{_age(age)} ago; it is dead"
    elif _is_late(beat, now):
        heard = f"{_age(age)} ago, and one is due every {beat.beat_seconds:g} s"
    else:
        heard = f"{_age(age)} ago"
    step = "-" if beat.step is None else str(beat.step)
    since = _age(max(0.0, beat.beat_at - beat.progress_at))
    return (str(beat.process), beat.host, str(beat.pid), step, beat.doing, since, heard)


def _is_late(beat: Beat, now: float) -> bool:
    return now - beat.beat_at > _LATE_BEATS * beat.beat_seconds


def _last_hang(run_dir: str) -> list[str]:
    hangs = read_hangs(run_dir)
    if not hangs:
        return []
    last = hangs[-1]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.get("time", 0)))
    return [f"last hang, of {len(hangs)}, {when}: {last.get('reason', json.dumps(last))}"]


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
