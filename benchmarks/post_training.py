"""What `sft_sea_small` and `dpo_sea_small` learn from real chats and pairs, after `cpt_sea_small`.

    python benchmarks/post_training.py tuning      [--start runs/cpt_sea_small]    some 10 minutes on 2 cores
    python benchmarks/post_training.py preferences [--start runs/tuning]           up to an hour on 2 cores

Both train in runs/ (a second call goes on where the first was stopped), print a table as the docs have it,
and write it as JSON with a plot. The first needs the data of `python -m sealion_configs.sft_sea_small`; the
second prepares its own, with another seed of what is held out for each of its three runs.

tuning: the loss of what the assistant says in held-out chats, in nats a token, before and after, by language.

preferences: on held-out pairs, how often the chosen answer's log-ratio to the model before is the larger,
pooled over three seeds (of what is held out, and of the data's order), with Wilson's 95% interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments import bars, report, train

from sealion_configs import dpo_sea_small, sft_sea_small
from sealion_jax import cli
from sealion_jax.evaluation.pairs import wilson_interval
from sealion_jax.metrics import Row

SEEDS = (0, 1, 2)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("tuning", "preferences"))
    parser.add_argument("--start", help="CHECKPOINT of the stage before")
    parser.add_argument("--output", default="docs/figures", help="folder for the table and the plot")
    parser.add_argument("--runs", default="runs", help="folder for the run directories")
    parser.add_argument("--data", default="data/sea_small_pairs", help="where pairs are prepared")
    options = parser.parse_args(argv)
    output, runs = Path(options.output), Path(options.runs)
    output.mkdir(parents=True, exist_ok=True)
    if options.experiment == "tuning":
        tuning(options.start or str(runs / "cpt_sea_small"), runs, output)
    else:
        preferences(options.start or str(runs / "tuning"), runs, output, Path(options.data))


def tuning(start: str, runs: Path, output: Path) -> None:
    """Trains sft_sea_small and compares the held-out loss of every language."""
    config = replace(sft_sea_small.recipe(), init_from=start)
    rows, seconds = train(config, runs / "tuning")
    before, after = rows[0], rows[-1]
    names = [name for name in after if name.startswith("eval/chats:") and name.endswith("/loss")]
    table = [
        {
            "language": name.removeprefix("eval/chats:").removesuffix("/loss"),
            "before": before[name],
            "after": after[name],
        }
        for name in sorted(names)
    ]
    table.append({"language": "all", "before": before["eval/chats/loss"], "after": after["eval/chats/loss"]})
    report("tuning", {"steps": config.steps, "seconds": round(seconds), "table": table}, output)
    bars(
        table,
        (("before", "0.8"), ("after", "C0")),
        "Held-out assistant loss before and after sft_sea_small",
        output / "tuning.png",
        unit="nats a token (lower is better)",
    )
    assert all(row["after"] < row["before"] for row in table), "a language did not learn"


def preferences(start: str, runs: Path, output: Path, data: Path) -> None:
    """Trains dpo_sea_small with three seeds and pools their held-out pairs."""
    ends: list[Row] = []
    seconds = 0.0
    for seed in SEEDS:
        folder = data / str(seed)
        dpo_sea_small.main(["--output", str(folder), "--hold-out-seed", str(seed)])
        config = dpo_sea_small.on(folder)
        config = replace(config, init_from=start, data=replace(config.data, seed=seed))
        rows, more = train(config, runs / "preferences" / str(seed))
        ends.append(rows[-1])
        seconds += more
    table = [
        {"pairs": name, **pooled(ends, sets)}
        for name, sets in (
            ("of people and models", ("pairs",)),
            ("wrong language", (dpo_sea_small.WRONG_LANGUAGE,)),
            ("all", ("pairs", dpo_sea_small.WRONG_LANGUAGE)),
        )
    ]
    report("preferences", {"steps": dpo_sea_small.STEPS, "seconds": round(seconds), "table": table}, output)
    _plot(table, output / "preferences.png")
    everything, wrong = table[2], table[1]
    assert everything["low"] > 0.5 and everything["margin"] > 0, "pairs are not told apart"
    assert wrong["low"] > 0.9, "wrong languages are not told"


def pooled(ends: Sequence[Row], sets: Sequence[str]) -> dict[str, float]:
    """Number, accuracy, its interval and the mean margin of some sets of all runs together."""
    parts = [{name: row[f"eval/{one}/{name}"] for name in METRICS} for row in ends for one in sets]
    count = sum(part["pairs"] for part in parts)
    accuracy, margin = (sum(part[name] * part["pairs"] for part in parts) / count for name in METRICS[1:])
    low, high = wilson_interval(accuracy, count)
    return {"number": count, "accuracy": accuracy, "low": low, "high": high, "margin": margin}


METRICS = ("pairs", "reward_accuracy", "reward_margin")


def _plot(table: Sequence[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, row in enumerate(table):
        low, high = row["accuracy"] - row["low"], row["high"] - row["accuracy"]
        axes.errorbar(row["accuracy"], place, xerr=[[low], [high]], fmt="o", capsize=4, color="C0")
    axes.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(table)), [f"{row['pairs']} ({row['number']:,})" for row in table])
    axes.invert_yaxis()
    axes.set_xlim(0.4, 1.0)
    axes.set(xlabel="share of held-out pairs, 95% interval", title="The chosen answer's reward is the larger")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    cli.run(main)
