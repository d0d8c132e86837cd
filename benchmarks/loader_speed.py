"""How fast the loader alone delivers packed batches, and how many positions packing wastes.

    python benchmarks/loader_speed.py [--output OUT.json] [--stores DIR DIR DIR] [--seconds 5]

Without --stores it writes three stores of synthetic documents (log-normal lengths, 40 million tokens each)
into a temporary folder. Next to the loader: Grain's own concatenate-and-split packing of the same documents
in the same shares, which has no random access and no loss mask. Prints a table, and writes JSON on request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset

from sealion_jax.data.batches import GlobalBatches
from sealion_jax.data.mixture import Mixture, MixtureConfig, SourceConfig
from sealion_jax.data.packing.windows import PackedWindows
from sealion_jax.data.store.manifest import SourceFile, StoreTokenizer
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import EncodedRows, StoreWriter

WEIGHTS = (0.5, 0.3725, 0.1275)
BOS, EOS = 2, 1


def main() -> None:
    """Parses, measures both lengths, prints, and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="where to write the figures as JSON")
    parser.add_argument("--stores", nargs=3, help="three token stores to read instead of synthetic ones")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each figure is measured")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens of a synthetic store")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = options.stores or write_stores(Path(folder), options.tokens)
        stores = [TokenStore.open(path) for path in paths]
        results = [
            measure(stores, length, rows, seconds=options.seconds)
            for length, rows in ((2048, 64), (8192, 16))
        ]
    report = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": os.getloadavg()[0],
        },
        "stores": [{"documents": store.num_documents, "tokens": store.num_tokens} for store in stores],
        "results": results,
    }
    print(table(results))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n")


def write_stores(folder: Path, tokens: int) -> list[str]:
    """Three stores of random documents, some 700 tokens long on average, a few very long."""
    paths = []
    for number in range(len(WEIGHTS)):
        rng = np.random.default_rng(number)
        lengths = np.clip(rng.lognormal(6.0, 1.1, tokens // 700), 3, 200_000).astype(np.int64)
        stream = rng.integers(300, 255_000, int(lengths.sum()), np.uint32)
        ends = np.cumsum(lengths)
        stream[ends - 1] = EOS
        stream[ends - lengths] = BOS
        path = folder / f"store{number}"
        write_store(path, stream, lengths)
        paths.append(str(path))
    return paths


def write_store(path: Path, stream: np.ndarray, lengths: np.ndarray) -> None:
    """A token store of documents that are tokens already."""
    rows = EncodedRows(
        rows=len(lengths),
        tokens=stream,
        lengths=lengths,
        text_bytes=4 * lengths,
        lines=np.arange(1, len(lengths) + 1),
        language_names=("und",),
        languages=np.zeros(len(lengths), np.uint16),
    )
    tokenizer = StoreTokenizer(fingerprint="synthetic", vocab_size=262_144, bos_id=BOS, eos_id=EOS)
    source = SourceFile(path="synthetic", format="tokens", bytes=0, sha256="", rows=0, documents=0)
    with StoreWriter(path, job="benchmark") as writer:
        writer.append(rows, source=0)
        writer.finish(tokenizer=tokenizer, sources=(source,), settings={})


def measure(stores: Sequence[TokenStore], length: int, rows: int, *, seconds: float) -> dict[str, Any]:
    """Figures of one sequence length."""
    config = MixtureConfig(
        sources=tuple(
            SourceConfig(name=f"source{k}", store=store.path, weight=weight)
            for k, (store, weight) in enumerate(zip(stores, WEIGHTS, strict=True))
        )
    )
    windows = [PackedWindows(store, length) for store in stores]
    mixture = Mixture(config, windows, global_batch_size=rows)
    batches = GlobalBatches(mixture, global_batch_size=rows)
    ours = tokens_per_second((batch for _, batch in batches.iterate(0, range(rows))), rows * length, seconds)
    peer = tokens_per_second(concat_then_split(stores, length, rows), rows * length, seconds)
    return {
        "sequence_length_tokens": length,
        "rows": rows,
        "tokens_per_second": ours,
        "grain_concat_then_split_tokens_per_second": peer,
        "wait_milliseconds": wait_milliseconds(batches, step_seconds=0.05, steps=60),
        **waste(batches, steps=100),
    }


def tokens_per_second(batches: Iterator[Any], tokens: int, seconds: float) -> float:
    """The rate after the first ten batches, over the given time."""
    for _ in itertools.islice(batches, 10):
        pass
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count * tokens / passed


def wait_milliseconds(batches: GlobalBatches, *, step_seconds: float, steps: int) -> float:
    """The mean time that a step of the given length waits for its batch, after the first ones."""
    iterator = batches.iterate(0, range(batches.global_batch_size))
    waits = []
    for _ in range(steps):
        asked = time.perf_counter()
        next(iterator)
        waits.append(time.perf_counter() - asked)
        time.sleep(step_seconds)
    return 1000 * sum(waits[5:]) / len(waits[5:])


def concat_then_split(stores: Sequence[TokenStore], length: int, rows: int) -> Iterator[Any]:
    """Batches as Grain packs documents by itself."""
    sources = [
        grain.MapDataset.range(store.num_documents)
        .seed(number)
        .shuffle()
        .repeat(None)
        .map(lambda d, store=store: {"tokens": store.document(d).astype(np.int32)})
        for number, store in enumerate(stores)
    ]
    mixed = grain.MapDataset.mix(sources, WEIGHTS).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=256)
    )
    return iter(ConcatThenSplitIterDataset(mixed, length_struct={"tokens": length}).batch(rows))


def waste(batches: GlobalBatches, *, steps: int) -> dict[str, float]:
    """Percent of positions that hold no token of the store: padding, and an inserted <bos>."""
    padding = inserted = positions = 0
    for step in range(steps):
        batch = batches.rows(step, range(batches.global_batch_size))
        padding += int(np.sum(batch["segment_ids"] == 0))
        inserted += int(np.sum(batch["loss_mask"][:, 0] == 0))
        positions += batch["tokens"].size
    return {
        "padding_percent": 100 * padding / positions,
        "inserted_bos_percent": 100 * inserted / positions,
        "waste_percent": 100 * (padding + inserted) / positions,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures, aligned."""
    header = ("T", "rows", "loader tok/s", "Grain concat-then-split tok/s", "wait in a 50 ms step", "waste")
    lines = [
        (
            str(result["sequence_length_tokens"]),
            str(result["rows"]),
            f"{result['tokens_per_second'] / 1e6:.1f}M",
            f"{result['grain_concat_then_split_tokens_per_second'] / 1e6:.1f}M",
            f"{result['wait_milliseconds']:.2f} ms",
            f"{result['waste_percent']:.3f}%",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (header, *lines)
    )


if __name__ == "__main__":
    main()
