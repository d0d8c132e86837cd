"""What a person sees of a run: progress, the table of languages before and after, and the summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from sealion_jax import storage
from sealion_jax.metrics import Row
from sealion_jax.objectives.base import BY_SOURCE, Metric

HEADLINES = {
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
}
"""What is shown of an evaluation, and how it is called; all else is in metrics.jsonl."""


OF_LANGUAGES = ("bits_per_byte",)
"""Of these the last table tells each language of a set; a language's pairs are often too few to say much."""


def progress_note(row: Row) -> str:
    """A step's loss, speed and learning rate, in a few words; of pairs also how many are told apart."""
    if row.get("loss") is None:
        return ""
    parts = [f"loss {row['loss']:.3f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if row.get("rewards/accuracies") is not None:
        parts.insert(1, f"accuracy {row['rewards/accuracies']:.0%}  margin {row['rewards/margins']:.2f}")
    if row.get("mfu") is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    return "  ".join([*parts, f"lr {row['learning_rate']:.2e}"])


def news(row: Row) -> str | None:
    """What is worth a line of its own in a step's row: an evaluation, a skipped update."""
    told = []
    for metric, title in HEADLINES.items():
        values = [row[name] for name in _named(row, metric) if not _is_part(name, metric, row)]
        values = [value for value in values if value is not None]
        if values:
            mean_of = f" (mean of {len(values)})" if len(values) > 1 else ""
            told.append(f"{title} {sum(values) / len(values):.3f}{mean_of}")
    if told:
        return f"step {row['step']}: held-out {', '.join(told)}"
    if row.get("nonfinite"):
        return f"step {row['step']}: loss or gradient not finite, update skipped"
    if row.get("spike"):
        return f"step {row['step']}: loss {row['loss']:.3f} above {row['spike_limit']:.3f}, update skipped"
    return None


def evaluation_table(rows: Sequence[Row]) -> str:
    """The headline numbers of every set at the first and the last evaluation; empty without any."""
    tables = (_table(rows, metric, title) for metric, title in HEADLINES.items())
    return "\n\n".join(table for table in tables if table)


def _table(rows: Sequence[Row], metric: str, title: str) -> str:
    evaluated = [row for row in rows if _named(row, metric)]
    if not evaluated:
        return ""
    first, last = evaluated[0], evaluated[-1]
    names = [
        name for name in _named(last, metric) if metric in OF_LANGUAGES or not _is_part(name, metric, last)
    ]
    width = max(len(title), *(len(_set_name(name, metric)) for name in names))
    steps = [f"step {row['step']}" for row in (first, last)]
    lines = [f"{title:<{width}}  {steps[0]:>10}  {steps[1]:>10}"]
    for name in names:
        lines.append(f"{_set_name(name, metric):<{width}}  {_cell(first, name)}  {_cell(last, name)}")
    return "\n".join(lines)


def _named(row: Row, metric: str) -> list[str]:
    """The names under which a row has a metric of held-out sets."""
    return [name for name in row if name.startswith("eval/") and name.endswith(f"/{metric}")]


def _is_part(name: str, metric: str, row: Row) -> bool:
    """Whether it is of one language of a set that the row has as a whole."""
    whole, colon, _ = _set_name(name, metric).rpartition(":")
    return bool(colon) and f"eval/{whole}/{metric}" in row


def _cell(row: Row, name: str) -> str:
    """Ten characters: blank where it was not measured; a number that is not finite is None in the log."""
    if name not in row:
        return " " * 10
    return "not finite" if row[name] is None else f"{row[name]:10.3f}"


def _set_name(name: str, metric: str) -> str:
    return name.removeprefix("eval/").removesuffix(f"/{metric}")


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
    storage.write_whole(run_dir / "summary.json", text.encode())


def summarise(metrics: Mapping[str, Any], sources: Sequence[str]) -> Row:
    """A step's metrics as plain numbers; means are taken here, last, from their summed parts.

    `<name>_by_source` becomes `<name>/<source>`, of those sources that the batch has something of.
    """
    row: Row = {}
    for name, value in sorted(metrics.items(), key=lambda item: item[0] != "loss"):
        if not isinstance(value, Metric):
            row[name] = value.item()
        elif name.endswith(BY_SOURCE):
            for source, total, weight in zip(sources, value.total, value.weight, strict=True):
                if weight > 0:
                    row[f"{name.removesuffix(BY_SOURCE)}/{source}"] = float(total / weight)
        else:
            row[name] = float(value.total) / float(value.weight) if value.weight > 0 else 0.0
    return row
