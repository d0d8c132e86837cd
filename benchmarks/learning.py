"""What `cpt_sea_small` learns from real text, and what continued pre-training forgets without replay.

    python benchmarks/learning.py learning   [--output docs/figures]     about 20 minutes on 2 cores
    python benchmarks/learning.py forgetting [--output docs/figures]     about 25 minutes on 2 cores

Both need the prepared data of `python -m sealion_configs.cpt_sea_small`. They train in runs/ (a second call
goes on where the first was stopped), print a table as the docs have it, and write it as JSON with a plot.

learning: held-out bits per byte of each language before and after, next to a unigram model of the language's
own training text. The unigram's smoothing is the one that serves it best on the held-out text itself.

forgetting: a model trained on English and Chinese goes on with the eleven other languages, once on them alone
and once with a share of English and Chinese mixed in.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from experiments import bars, report, train

from sealion_configs import cpt_sea_small
from sealion_jax import cli
from sealion_jax.data.mixture import MixtureConfig
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.evaluation.documents import read_documents
from sealion_jax.metrics import Row
from sealion_jax.recipe import TrainConfig
from sealion_jax.tokenizer import Tokenizer

OLD_LANGUAGES = ("en", "zh")
REPLAY_SHARE = 0.25
FORGETTING_STEPS = 120


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("learning", "forgetting"))
    parser.add_argument("--output", default="docs/figures", help="folder for the table and the plot")
    parser.add_argument("--runs", default="runs", help="folder for the run directories")
    parser.add_argument("--steps", type=int, help="instead of the experiment's own number of steps")
    options = parser.parse_args(argv)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    experiment = {"learning": learning, "forgetting": forgetting}[options.experiment]
    experiment(Path(options.runs), output, options.steps)


def learning(runs: Path, output: Path, steps: int | None) -> None:
    """Trains the recipe and compares it with unigram models."""
    config = cpt_sea_small.recipe()
    if steps:
        config = replace(config, steps=steps)
    rows, seconds = train(config, runs / "learning")
    tokenizer = Tokenizer.load(config.tokenizer)
    table = []
    for source in config.data.sources:
        language = source.name
        table.append(
            {
                "language": language,
                "before": rows[0][f"eval/{language}/bits_per_byte"],
                "after": rows[-1][f"eval/{language}/bits_per_byte"],
                "unigram": unigram_bits_per_byte(
                    TokenStore.open(source.store), config.evaluation.sets[language], tokenizer
                ),
            }
        )
    trained = json.loads((runs / "learning" / "summary.json").read_text())["counters"]["tokens"]
    result = {"steps": config.steps, "seconds": round(seconds), "tokens": trained, "table": table}
    report("learning", result, output)
    _plot_learning(table, output / "learning.png")
    assert all(row["after"] < min(row["before"], row["unigram"]) for row in table), "a language did not learn"


def unigram_bits_per_byte(store: TokenStore, held_out: str, tokenizer: Tokenizer) -> float:
    """Bits per byte of a smoothed unigram model of the store on the held-out file: text tokens only."""
    counts = np.bincount(store.read(0, store.num_tokens), minlength=tokenizer.vocab_size).astype(np.float64)
    counts[[tokenizer.bos_id, tokenizer.eos_id]] = 0
    documents = read_documents(held_out)
    text = np.concatenate(tokenizer.encode_arrays([document.text for document in documents]))
    num_bytes = sum(document.num_bytes for document in documents)

    def bits(alpha: float) -> float:
        log_probs = np.log(counts + alpha) - math.log(counts.sum() + alpha * len(counts))
        return float(-log_probs[text].sum() / math.log(2) / num_bytes)

    return min(bits(alpha) for alpha in (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0))


def forgetting(runs: Path, output: Path, steps: int | None) -> None:
    """Trains on the old languages, then on the new ones with and without the old."""
    steps = steps or FORGETTING_STEPS
    base = _with_weights(cpt_sea_small.recipe(), "base", dict.fromkeys(OLD_LANGUAGES, 1.0), steps)
    names = [source.name for source in cpt_sea_small.recipe().data.sources]
    new = [name for name in names if name not in OLD_LANGUAGES]
    alone = dict.fromkeys(new, 1.0 / len(new))
    replayed = {name: (1 - REPLAY_SHARE) * share for name, share in alone.items()} | dict.fromkeys(
        OLD_LANGUAGES, REPLAY_SHARE / len(OLD_LANGUAGES)
    )
    base_rows, seconds = train(base, runs / "forgetting" / "base")
    results: dict[str, Row] = {"base": base_rows[-1]}
    for name, weights in (("without_replay", alone), ("with_replay", replayed)):
        config = _with_weights(cpt_sea_small.recipe(), name, weights, steps)
        config = replace(config, init_from=str(runs / "forgetting" / "base"))
        rows, more = train(config, runs / "forgetting" / name)
        results[name] = rows[-1]
        seconds += more
    table = [
        {"language": name, **{run: row[f"eval/{name}/bits_per_byte"] for run, row in results.items()}}
        for name in (*OLD_LANGUAGES, *new)
    ]
    result = {"steps": steps, "seconds": round(seconds), "replay_share": REPLAY_SHARE, "table": table}
    report("forgetting", result, output)
    _plot_forgetting(table, output / "forgetting.png")


def _with_weights(config: TrainConfig, name: str, weights: dict[str, float], steps: int) -> TrainConfig:
    """The recipe on these sources alone, with these weights."""
    sources = tuple(
        replace(source, weight=weights[source.name])
        for source in config.data.sources
        if source.name in weights
    )
    schedule = replace(config.optimizer.schedule, warmup_steps=steps // 10)
    return replace(
        config,
        name=name,
        steps=steps,
        data=MixtureConfig(sources=sources),
        optimizer=replace(config.optimizer, schedule=schedule),
    )


def _plot_learning(table: Sequence[dict], path: Path) -> None:
    series = (("before", "0.8"), ("unigram", "C1"), ("after", "C0"))
    bars(table, series, "Held-out text before and after cpt_sea_small", path)


def _plot_forgetting(table: Sequence[dict], path: Path) -> None:
    series = (("base", "0.8"), ("without_replay", "C3"), ("with_replay", "C0"))
    bars(table, series, "English and Chinese first, then eleven languages", path)


if __name__ == "__main__":
    cli.run(main)
