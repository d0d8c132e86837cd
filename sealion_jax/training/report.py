"""What a person sees of a run: progress, the table of languages before and after, and the summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from sealion_jax.metrics import Row


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds, so that logs stay readable."""

    def __init__(self, *, steps: int, first_step: int, seconds_between_lines: float = 10.0) -> None:
        self._steps = steps
        self._pause = seconds_between_lines
        self._last_line = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def show(self, row: Row) -> None:
        """Takes notice of a step's row."""
        evaluated = sum(name.endswith("/bits_per_byte") for name in row)
        if evaluated:
            mean = sum(v for k, v in row.items() if k.endswith("/bits_per_byte")) / evaluated
            self._say(
                f"step {row['step']}/{self._steps}  held-out bits per byte {mean:.3f} (mean of {evaluated} sets)"
            )
        if row.get("loss") is None:
            if "nonfinite" in row:
                self._say(f"step {row['step']}: loss or gradient not finite, update skipped")
            return
        text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s"
        if row.get("mfu") is not None:
            text += f"  mfu {row['mfu']:.1%}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            self._bar.update(row["step"] - self._bar.n)
        elif time.monotonic() - self._last_line > self._pause or row["step"] == self._steps:
            self._last_line = time.monotonic()
            self._say(f"step {row['step']}/{self._steps}  {text}  lr {row['learning_rate']:.2e}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def evaluation_table(rows: Sequence[Row]) -> str:
    """Bits per byte of every evaluated set, at the first and the last evaluation; empty without any."""
    evaluated = [row for row in rows if any(name.endswith("/bits_per_byte") for name in row)]
    if not evaluated:
        return ""
    first, last = evaluated[0], evaluated[-1]
    names = [name for name in last if name.endswith("/bits_per_byte")]
    width = max(len("bits per byte"), *(len(_set_name(name)) for name in names))
    steps = [f"step {row['step']}" for row in (first, last)]
    lines = [f"{'bits per byte':<{width}}  {steps[0]:>10}  {steps[1]:>10}"]
    for name in names:
        before = f"{first[name]:10.3f}" if first.get(name) is not None else " " * 10
        lines.append(f"{_set_name(name):<{width}}  {before}  {last[name]:10.3f}")
    return "\n".join(lines)


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
    new = run_dir / "summary.json.new"
    new.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    new.replace(run_dir / "summary.json")


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
