"""What a person sees of a run: progress, the table of languages before and after, and the summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from sealion_jax.data import files
from sealion_jax.metrics import Row


def progress_note(row: Row) -> str:
    """A step's loss, speed and learning rate, in a few words."""
    if row.get("loss") is None:
        return ""
    parts = [f"loss {row['loss']:.3f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if row.get("mfu") is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    return "  ".join([*parts, f"lr {row['learning_rate']:.2e}"])


def news(row: Row) -> str | None:
    """What is worth a line of its own in a step's row: an evaluation, a skipped update."""
    bits = [row[name] for name in _bits(row) if not _is_part(name, row)]
    if bits:
        return f"step {row['step']}: held-out bits per byte {sum(bits) / len(bits):.3f} (mean of {len(bits)})"
    if row.get("nonfinite"):
        return f"step {row['step']}: loss or gradient not finite, update skipped"
    return None


def evaluation_table(rows: Sequence[Row]) -> str:
    """Bits per byte of every evaluated set, at the first and the last evaluation; empty without any."""
    evaluated = [row for row in rows if _bits(row)]
    if not evaluated:
        return ""
    first, last = evaluated[0], evaluated[-1]
    names = _bits(last)
    width = max(len("bits per byte"), *(len(_set_name(name)) for name in names))
    steps = [f"step {row['step']}" for row in (first, last)]
    lines = [f"{'bits per byte':<{width}}  {steps[0]:>10}  {steps[1]:>10}"]
    for name in names:
        lines.append(f"{_set_name(name):<{width}}  {_cell(first, name)}  {_cell(last, name)}")
    return "\n".join(lines)


def _bits(row: Row) -> list[str]:
    return [name for name in row if name.endswith("/bits_per_byte")]


def _is_part(metric: str, row: Row) -> bool:
    """Whether it is of one language of a set that the row has as a whole."""
    whole, colon, _ = _set_name(metric).rpartition(":")
    return bool(colon) and f"eval/{whole}/bits_per_byte" in row


def _cell(row: Row, metric: str) -> str:
    """Ten characters: blank where it was not measured; a number that is not finite is None in the log."""
    if metric not in row:
        return " " * 10
    return "not finite" if row[metric] is None else f"{row[metric]:10.3f}"


def _set_name(metric: str) -> str:
    return metric.removeprefix("eval/").removesuffix("/bits_per_byte")


def write_summary(run_dir: epath.Path, rows: Sequence[Row], extra: dict[str, Any]) -> None:
    """Writes summary.json: where the run ended, and its evaluations before and after."""
    trained = [row for row in rows if "loss" in row]
    evaluated = [
        {"step": row["step"], **{k: v for k, v in row.items() if k.startswith("eval/")}}
        for row in rows
        if any(name.startswith("eval/") for name in row)
    ]
    summary = {
        **extra,
        "step": rows[-1]["step"] if rows else 0,
        "final_loss": trained[-1]["loss"] if trained else None,
        "evaluation_before": evaluated[0] if evaluated else None,
        "evaluation_after": evaluated[-1] if evaluated else None,
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    files.write_whole(Path(run_dir / "summary.json"), text.encode())


def summarise(metrics: dict[str, Any], sources: Sequence[str]) -> Row:
    """A step's metrics as plain numbers; means are taken here, last, from their summed parts."""
    total, weight = metrics["loss"]
    row: Row = {"loss": float(total) / max(float(weight), 1.0)}
    row |= {name: float(metrics[name]) for name in ("learning_rate", "grad_norm")}
    row |= {name: int(metrics[name]) for name in ("tokens", "nonfinite")}
    totals, weights = metrics["loss_by_source"]
    for source, source_total, source_weight in zip(sources, totals, weights, strict=True):
        if source_weight > 0:
            row[f"loss/{source}"] = float(source_total / source_weight)
    return row
