"""What follows from a verdict: it is told, and silent processes are killed where they run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from sealion_jax.watching.beats import HANGS_FILE, Beat, BeatFiles
from sealion_jax.watching.stacks import stacks_of_other
from sealion_jax.watching.verdict import can_be_killed_here

_TOLD = 8
"""Of the silent processes each process names so many; all are in the verdict."""
_PAUSE_SECONDS = 1.0


def execute(
    verdict: Mapping[str, Any],
    *,
    own: Beat,
    files: BeatFiles,
    wrote_it: bool,
    run_dir: str,
    report: Callable[[str], None],
) -> None:
    """Says what was decided, and kills the silent processes of this machine; the caller then ends itself.

    When process 0 dies JAX ends all others at once. So whoever wrote the verdict kills nobody before the
    others, who look for the verdict twice a heartbeat, are through; and process 0 goes last.

    Args:
        own: this process's last heartbeat.
        wrote_it: whether the verdict is this process's.
    """
    lines = [str(line) for line in verdict.get("lines", [])]
    silent = [int(process) for process in verdict.get("silent", [])]
    for line in lines if wrote_it else lines[: 1 + min(len(silent), _TOLD)]:
        report(line)
    if not wrote_it and "processes" in verdict:
        report(f"  what each process did is in {run_dir.rstrip('/')}/{HANGS_FILE}")
    if own.process in silent:
        return  # stopped until now, so nobody waits for what it says, and it must write nothing more
    if own.processes > 1:
        time.sleep(_PAUSE_SECONDS)
    if own.processes > 1 and (wrote_it or own.process == 0):
        time.sleep(own.beat_seconds / 2 + _PAUSE_SECONDS)
    by = files.read(int(verdict.get("written_by", own.process)))
    if wrote_it or by is None or by.machine != own.machine:
        for beat in files.read_many(silent).values():
            _kill(beat, files=files, report=report)
    if own.processes > 1 and own.process == 0 and not wrote_it:
        time.sleep(2 * _PAUSE_SECONDS)


def _kill(beat: Beat | None, *, files: BeatFiles, report: Callable[[str], None]) -> None:
    """Ends a silent process of this attempt and machine, and keeps the stacks that it was able to write."""
    if beat is None or not can_be_killed_here(beat):
        return
    stacks = stacks_of_other(beat.pid, beat.stacks_descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(beat.pid, signal.SIGKILL)
    if stacks:
        path = files.keep(f"{beat.process}.stacks.txt", stacks)
        report(f"killed {beat.describe()}, which wrote its stacks before: {path}")
    else:
        report(f"killed {beat.describe()}")
