"""What befell a run that no row of metrics tells: `<run>/events.jsonl`, one object a line, oldest first."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
from etils import epath

from sealion_jax.checkpoint.digests import write_whole

EVENTS_FILE = "events.jsonl"


def note_event(run_dir: epath.Path, event: str, **values: Any) -> None:
    """Adds a line, on the first process: `time` (seconds since 1970), `event`, and the values.

    The file is written anew: events are few, and in a bucket nothing can be appended to.
    """
    if jax.process_index() != 0:
        return
    line = json.dumps({"time": time.time(), "event": event, **values}, ensure_ascii=False) + "\n"
    write_whole(run_dir / EVENTS_FILE, (_text(run_dir) + line).encode())


def read_events(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none where nothing happened."""
    return [json.loads(line) for line in _text(epath.Path(run_dir)).splitlines()]


def _text(run_dir: epath.Path) -> str:
    path = run_dir / EVENTS_FILE
    return path.read_text() if path.exists() else ""
