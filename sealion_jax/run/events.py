"""What befell a run that no row of metrics tells: `<run>/events.jsonl`, one object a line, oldest first."""

from __future__ import annotations

import time
from typing import Any

import jax
from etils import epath

from sealion_jax.storage import add_line, read_lines

EVENTS_FILE = "events.jsonl"


def note_event(run_dir: epath.Path, event: str, **values: Any) -> None:
    """Adds a line, on the first process: `time` (seconds since 1970), `event`, and the values."""
    if jax.process_index() == 0:
        add_line(run_dir / EVENTS_FILE, {"time": time.time(), "event": event, **values})


def read_events(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none where nothing happened."""
    return read_lines(epath.Path(run_dir) / EVENTS_FILE)
