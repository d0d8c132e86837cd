"""What the experiments on real data share: a run, its table, its bars."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from sealion_jax.metrics import Row, read_rows
from sealion_jax.recipe import TrainConfig
from sealion_jax.run import runner


def train(config: TrainConfig, run_dir: Path) -> tuple[list[Row], float]:
    """The evaluated rows of a run, and the seconds of wall time that this call took."""
    started = time.time()
    runner.train(config, epath.Path(run_dir))
    rows = read_rows(epath.Path(run_dir) / "metrics.jsonl")
    return [row for row in rows if any(name.startswith("eval/") for name in row)], time.time() - started


def report(name: str, result: dict, output: Path | None) -> None:
    """Prints the table as the docs have it, its first column a name; writes it as JSON if told where."""
    columns = list(result["table"][0])
    print("| " + " | ".join(columns) + " |")
    print("| --- " + "| ---: " * (len(columns) - 1) + "|")
    for row in result["table"]:
        numbers = [f"{row[column]:.3f}" for column in columns[1:]]
        print(f"| {row[columns[0]]} | " + " | ".join(numbers) + " |")
    print({key: value for key, value in result.items() if key != "table"})
    if output is not None:
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def bars(
    table: Sequence[dict],
    series: Sequence[tuple[str, str]],
    title: str,
    path: Path,
    *,
    unit: str = "bits per byte (lower is better)",
) -> None:
    """Draws groups of two or three bars, a group for each row of the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    place = np.arange(len(table))
    for number, (name, colour) in enumerate(series):
        axes.bar(
            place + 0.27 * (number - (len(series) - 1) / 2),
            [row[name] for row in table],
            0.26,
            color=colour,
            label=name.replace("_", " "),
        )
    axes.set_xticks(place, [next(iter(row.values())) for row in table])
    axes.set(ylabel=unit, title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(y=0.15)  # room for the legend above the bars
    axes.legend(loc="upper right", ncols=len(series))
    figure.savefig(path)
