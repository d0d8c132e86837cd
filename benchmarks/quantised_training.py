"""What training in eight bits does to the loss: cpt_tiny in bfloat16, int8 and fp8, step by step.

    pip install -e '.[quantization]'
    python benchmarks/quantised_training.py --output docs/figures       some ten minutes on 2 cores

Writes the table, the curves and JSON, and fails if the loss of int8, averaged over any ten steps in a row, is
not within 1% of bfloat16's. Only the numbers are a TPU's or GPU's: a CPU multiplies eight bits no faster.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from etils import epath
from experiments import report

from sealion_configs import cpt_tiny
from sealion_jax.metrics import read_rows
from sealion_jax.run import runner
from sealion_jax.training.config import LoggingConfig

BOUND = 0.01
STEPS_AVERAGED = 10
COLOURS = {"none": "black", "int8": "C0", "fp8": "C1"}


def main() -> None:
    """Trains three times, compares, and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="folder for table, JSON and plot; none without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: train(name, Path(folder) / name) for name in COLOURS}
    averaged = {name: moving_mean(values, STEPS_AVERAGED) for name, values in losses.items()}
    table = [
        {
            "products": "bfloat16" if name == "none" else name,
            "loss, last ten steps": averaged[name][-1],
            "largest difference, %": 100 * float(np.abs(averaged[name] / averaged["none"] - 1).max()),
        }
        for name in losses
    ]
    result = {"steps": len(losses["none"]), "averaged_over_steps": STEPS_AVERAGED, "table": table}
    output = None if options.output is None else Path(options.output)
    report("quantised_training", result, output)
    if output is not None:
        plot(losses, output / "quantised_training.png")
    assert table[1]["largest difference, %"] <= 100 * BOUND, "int8 is further than 1% from bfloat16"


def train(quantization: str, run_dir: Path) -> np.ndarray:
    """The loss of every step of cpt_tiny."""
    config = cpt_tiny.recipe()
    compute = replace(config.compute, dtype="bfloat16", quantization=quantization)
    config = replace(config, compute=compute, logging=LoggingConfig(interval_steps=1))
    runner.train(config, epath.Path(run_dir))
    rows = read_rows(epath.Path(run_dir) / "metrics.jsonl")
    return np.array([row["loss"] for row in rows if "loss" in row])


def moving_mean(values: np.ndarray, count: int) -> np.ndarray:
    """The means of every `count` values in a row."""
    return np.convolve(values, np.ones(count) / count, mode="valid")


def plot(losses: Mapping[str, np.ndarray], path: Path) -> None:
    """The curves, and below them how far the quantised ones are from bfloat16's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, values in losses.items():
        label = "bfloat16" if name == "none" else name
        above.plot(np.arange(1, len(values) + 1), values, color=COLOURS[name], label=label, lw=1)
        if name != "none":
            away = moving_mean(values, STEPS_AVERAGED) / moving_mean(losses["none"], STEPS_AVERAGED) - 1
            below.plot(np.arange(STEPS_AVERAGED, len(values) + 1), 100 * away, color=COLOURS[name])
    below.axhspan(-100 * BOUND, 100 * BOUND, color="0.9")
    above.set(ylabel="loss, nats a token", title="cpt_tiny with products in bfloat16 and in eight bits")
    below.set(xlabel="step", ylabel="difference, %\n(means of ten steps)")
    above.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
