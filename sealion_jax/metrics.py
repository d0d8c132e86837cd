"""A run's numbers on disk: metrics.jsonl, which is the record, and TensorBoard, which is made from it."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from etils import epath

Row = dict[str, Any]


class MetricsLog:
    """One JSON object a logged step, appended to `<run>/metrics.jsonl` and mirrored to `<run>/tensorboard/`.

    Opening it for a run that goes on after step N drops every row after N, and lines that are no rows, and
    writes TensorBoard's file anew from what is left: a step never has two rows in either.
    """

    def __init__(self, run_dir: epath.Path, *, last_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._tensorboard_dir = run_dir / "tensorboard"
        self.rows = [row for row in read_rows(self._path) if row["step"] <= last_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The file that takes the name is the one that is appended to, with its rows on disk already.
        replacement = self._path.parent / "metrics.jsonl.new"
        self._file = open(replacement, "w", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._file.writelines(map(_line, self.rows))
        self.sync()
        replacement.replace(self._path)
        self._writer = fresh_tensorboard(self._tensorboard_dir)
        for row in self.rows:
            self._mirror(row)
        self._writer.flush()

    def append(self, row: Row) -> None:
        """Writes a step's row, for everyone to read; a power cut may still take it until `sync`."""
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()
        self._mirror(row)
        self._writer.flush()

    def sync(self) -> None:
        """Has all rows of metrics.jsonl on disk: before a checkpoint is, whose steps are not run again."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._writer.close()

    def _mirror(self, row: Row) -> None:
        """Queues a row for TensorBoard, as one event: one for each number takes ten times as long."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in ("step", "time") and isinstance(value, int | float)
        ]
        self._writer.add_summary(Summary(value=values), row["step"], row.get("time"))


def read_rows(
    path: epath.Path,
    *,
    needed: Mapping[str, type] = MappingProxyType({"step": int}),
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> list[Row]:
    """The rows of a run's log, oldest first; lines that are damaged are left out, and their number reported.

    A last line cut short by a crash is left out without a word.

    Args:
        needed: what every row has, by name.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")  # other ends of lines may stand in a text
    found = [_row(line, needed) for line in lines]
    if damaged := found.count(None):
        report(f"{path.name}: {damaged} of {len(lines)} lines are damaged, and left out")
    return [row for row in [*found, _row(torn, needed)] if row is not None]


def _row(line: bytes, needed: Mapping[str, type]) -> Row | None:
    """The row that a line holds; None if it is no such line."""
    try:
        row = json.loads(line)
        _line(row).encode()  # what is read is written again: no infinities, no halves of characters
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in needed.items()):
        return None
    return row


def plain(values: Mapping[str, Any]) -> Row:
    """The values as JSON can hold them: numbers that are not finite become None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def fresh_tensorboard(folder: epath.Path) -> Any:
    """A writer into a folder of TensorBoard events, from which older ones are removed."""
    from tensorboardX import FileWriter

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return FileWriter(str(folder))
