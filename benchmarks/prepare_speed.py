"""How fast `prepare` is, next to SentencePiece alone on the same text.

    python benchmarks/prepare_speed.py                # all cores, Gemma 3's tokenizer; minutes on 2 cores
    python benchmarks/prepare_speed.py --repeat 1     # under a minute

The text is that of the shared data's cpt/*.jsonl, each file `--repeat` times. Measured, in turns, in one run:

    sentencepiece          encode() of a list of all texts in memory, out_type="numpy", on that many threads
    prepare                all of it, from JSONL files to a finished token store: hashing the inputs, JSON,
                           encoding in worker processes, writing, hashing and flushing the store
    prepare in threads     the same but for threads of one process in the place of worker processes

Megabytes of UTF-8 text a second (the best of `--rounds`), and a second of processor time (which other work on
the machine disturbs less). Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import sentencepiece

from sealion_jax.data.preparation import prepare as preparation
from sealion_jax.data.preparation.prepare import PrepareOptions, prepare
from sealion_jax.tokenizer import Tokenizer


class NoProgress(contextlib.AbstractContextManager["NoProgress"]):
    """Shows nothing."""

    def __init__(self, total: int, description: str, /, *, initial: int = 0) -> None:
        pass

    def update(self, amount: int = 1) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def in_threads(
    make_function: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    items: Iterable[Any],
    *,
    workers: int,
) -> Iterator[tuple[Any, Any]]:
    """What `ordered_map` does, in threads of this process."""
    function = make_function(*arguments)
    with ThreadPoolExecutor(workers) as threads:
        waiting = []
        for item in items:
            waiting.append((item, threads.submit(function, item)))
            if len(waiting) >= 2 * workers:
                first, result = waiting.pop(0)
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = os.environ.get("SEALION_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default), help="the shared data's folder")
    parser.add_argument("--tokenizer", default="tokenizer/gemma3_262k.model", help="in that folder")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--output", default="prepare_speed.json")
    options = parser.parse_args()
    files = sorted((options.data / "cpt").glob("*.jsonl"))
    if not files:
        parser.error(f"no {options.data}/cpt/*.jsonl: set SEALION_SHARED_DATA, or give --data")
    tokenizer = Tokenizer.load(options.data / options.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        inputs, texts = copies(files, Path(name) / "texts", options.repeat)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        measure = Measure(tokenizer, [str(path) for path in inputs], texts, Path(name))
        seconds: dict[str, list[float]] = {}
        processor_seconds: dict[str, list[float]] = {}
        for round_number in range(options.rounds):
            for workers in options.workers:
                for what, run in measure.kinds(workers):
                    began, used = time.perf_counter(), sum(os.times()[:4])
                    run()
                    key = f"{what}, {workers}"
                    seconds.setdefault(key, []).append(time.perf_counter() - began)
                    processor_seconds.setdefault(key, []).append(sum(os.times()[:4]) - used)
            print(f"round {round_number + 1} of {options.rounds} done", flush=True)
    rows = {key: megabytes / min(times) for key, times in seconds.items()}
    used_rows = {key: megabytes / min(times) for key, times in processor_seconds.items()}
    print(f"\n{megabytes:.1f} MB of text; in brackets, the share of SentencePiece's")
    report("MB a second", rows, options.workers)
    report("MB a second of processor time", used_rows, options.workers)
    result = {
        "megabytes": megabytes,
        "tokenizer": options.tokenizer,
        "sentencepiece": sentencepiece.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "megabytes_per_second": rows,
        "megabytes_per_processor_second": used_rows,
        "prepare_over_sentencepiece": {
            workers: rows[f"prepare, {workers}"] / rows[f"sentencepiece, {workers}"]
            for workers in options.workers
        },
        "seconds": seconds,
        "processor_seconds": processor_seconds,
    }
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


def copies(files: list[Path], folder: Path, repeat: int) -> tuple[list[Path], list[str]]:
    """Files in `folder` with the rows of each of `files` `repeat` times, and all their texts."""
    folder.mkdir()
    texts = []
    for file in files:
        content = file.read_bytes()
        (folder / file.name).write_bytes(content * repeat)
        texts += [json.loads(line)["text"] for line in content.splitlines()] * repeat
    return [folder / file.name for file in files], texts


class Measure:
    """The things that are timed, ready to be called."""

    def __init__(self, tokenizer: Tokenizer, inputs: list[str], texts: list[str], folder: Path) -> None:
        self._tokenizer, self._inputs, self._texts, self._folder = tokenizer, inputs, texts, folder
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
        self._stores = 0

    def kinds(self, workers: int) -> list[tuple[str, Callable[[], object]]]:
        return [
            ("sentencepiece", lambda: self._alone(workers)),
            ("prepare", lambda: self._prepare(workers)),
            ("prepare in threads", lambda: self._prepare_in_threads(workers)),
        ]

    def _alone(self, workers: int) -> object:
        return self._processor.encode(self._texts, out_type="numpy", num_threads=workers)

    def _prepare(self, workers: int) -> None:
        self._stores += 1
        prepare(
            self._inputs,
            str(self._folder / f"store{self._stores}"),
            tokenizer=self._tokenizer,
            options=PrepareOptions(workers=workers),
            show=NoProgress,
        )

    def _prepare_in_threads(self, workers: int) -> None:
        with mock.patch.object(preparation, "ordered_map", in_threads):
            self._prepare(workers)


def report(what: str, rows: dict[str, float], workers: list[int]) -> None:
    print(f"\n{what}\n{'workers':>8} {'sentencepiece':>14} {'prepare':>16} {'prepare in threads':>20}")
    for n in workers:
        alone, ours, threads = (
            rows[f"{what}, {n}"] for what in ("sentencepiece", "prepare", "prepare in threads")
        )
        print(
            f"{n:>8} {alone:>14.2f} {ours:>9.2f} ({ours / alone:.2f}) "
            f"{threads:>13.2f} ({threads / alone:.2f})"
        )


if __name__ == "__main__":
    main()
