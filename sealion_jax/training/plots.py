"""Pictures of a run, drawn from its metrics.jsonl alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from sealion_jax.metrics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plots(rows: Sequence[Row], folder: epath.Path) -> None:
    """Writes `loss.png` into the folder, `bits_per_byte.png` where texts or chats were evaluated, and
    `preferences.png` where pairs were trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [row for row in rows if row.get("loss") is not None]
    if trained:
        _write(_loss_figure(trained), folder / "loss.png")
    if any("rewards/margins" in row for row in trained):
        _write(_preference_figure(rows), folder / "preferences.png")
    evaluated = [row for row in rows if any(name.endswith("/bits_per_byte") for name in row)]
    if evaluated:
        _write(_bits_figure(evaluated), folder / "bits_per_byte.png")


def _loss_figure(rows: Sequence[Row]) -> Figure:
    figure, (loss_axes, rate_axes) = _figure(2)
    steps = [row["step"] for row in rows]
    losses = np.array([row["loss"] for row in rows])
    loss_axes.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 25)
    if window > 1:
        loss_axes.plot(steps[window - 1 :], _smooth(losses, window), label=f"mean of {window} steps")
    unit = "nats a pair" if "rewards/margins" in rows[-1] else "nats a token"
    loss_axes.set(xlabel="step", ylabel=f"loss ({unit})", title="Training loss")
    loss_axes.legend()
    rate_axes.plot(steps, [row["learning_rate"] for row in rows], color="C1")
    rate_axes.set(xlabel="step", ylabel="learning rate", title="Learning rate and gradient norm")
    norms = rate_axes.twinx()
    norms.plot(steps, [row["grad_norm"] or np.nan for row in rows], color="C2", linewidth=0.8)
    norms.set_ylabel("gradient norm", color="C2")
    norms.set_yscale("log")
    return figure


def _preference_figure(rows: Sequence[Row]) -> Figure:
    """Rewards of both answers, and how often the chosen one's is larger, in training and held out."""
    figure, (reward_axes, accuracy_axes) = _figure(2)
    trained = [row for row in rows if row.get("rewards/margins") is not None]
    steps = [row["step"] for row in trained]
    window = max(1, len(steps) // 25)
    for name, color in (("chosen", "C2"), ("rejected", "C3"), ("margins", "C0")):
        values = np.array([row[f"rewards/{name}"] for row in trained])
        reward_axes.plot(steps[window - 1 :], _smooth(values, window), color=color, label=name)
    reward_axes.set(xlabel="step", ylabel="reward (nats, times beta)", title=f"Rewards, {_over(window)}")
    reward_axes.legend()
    accuracies = np.array([row["rewards/accuracies"] for row in trained])
    accuracy_axes.plot(
        steps[window - 1 :],
        _smooth(accuracies, window),
        color="0.75",
        label=f"training, {_over(window)}",
    )
    names = sorted({name for row in rows for name in row if name.endswith("/reward_accuracy")})
    wholes = [name for name in names if name.rpartition(":")[0] + "/reward_accuracy" not in names]
    for name in wholes:  # a language's pairs are often too few to say much
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        label = name.removeprefix("eval/").removesuffix("/reward_accuracy")
        accuracy_axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    accuracy_axes.set(xlabel="step", ylabel="share of pairs", title="The chosen answer's reward is larger")
    accuracy_axes.set_ylim(0, 1.03)
    accuracy_axes.legend()
    return figure


def _over(window: int) -> str:
    """How many steps a smoothed point is of, in words."""
    return "each step" if window == 1 else f"mean of {window} steps"


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Means of so many values in a row."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _bits_figure(rows: Sequence[Row]) -> Figure:
    names = sorted({name for row in rows for name in row if name.endswith("/bits_per_byte")})
    figure, (curve_axes, bar_axes) = _figure(2)
    for number, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:  # never finite
            continue
        style = "-" if number < 10 else "--"
        curve_axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=_label(name))
    curve_axes.set(xlabel="step", ylabel="bits per byte", title="Held-out text")
    if curve_axes.lines:
        curve_axes.legend(fontsize="x-small", ncols=2)
    height = np.arange(len(names))
    bar_axes.barh(height + 0.2, [rows[0].get(name) or 0 for name in names], 0.4, color="0.75", label="before")
    bar_axes.barh(height - 0.2, [rows[-1].get(name) or 0 for name in names], 0.4, color="C0", label="after")
    bar_axes.set_yticks(height, [_label(name) for name in names])
    bar_axes.invert_yaxis()
    bar_axes.set(
        xlabel="bits per byte (lower is better)", title=f"Step {rows[0]['step']} and {rows[-1]['step']}"
    )
    bar_axes.legend()
    return figure


def _label(name: str) -> str:
    return name.removeprefix("eval/").removesuffix("/bits_per_byte")


def _figure(columns: int) -> tuple[Figure, Sequence]:
    # The object interface: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.2), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


def _write(figure: Figure, path: epath.Path) -> None:
    # A reader that looks while we draw sees the old picture or the new one, never half of one.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    new = path.parent / f"{path.name}.new"
    new.write_bytes(buffer.getvalue())
    new.replace(path)
