"""The training step beside those of Transformers, Tunix and EasyDeL, same work, in one run.

    python benchmarks/training_step.py --install   environments for Tunix and EasyDeL; once, some minutes
    python benchmarks/training_step.py             CPU, float32, 54M parameters; some 10 minutes on 2 cores
    python benchmarks/training_step.py --gpu       Gemma 3 1B and 4B in bfloat16, beside Transformers alone

Every step is the whole of it: forward, backward, clipping, AdamW with decay. All begin with the same weights
and train on the same tokens, and must give the same losses over the first three steps. Each runs in a process
of its own, compiles first, and then they take turns, so that whatever else the machine does falls on all of
them. Prints tokens a second and how many times as fast sealion_jax is, and writes JSON.

Fails if Transformers' losses are not ours. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from peers.turns import Batch, Job
from peers.workers import OURS, PEERS, REFERENCE, Worker, WorkerError, install, started

from sealion_jax.checkpoint.hf import export_hf
from sealion_jax.checkpoint.hf_exportable import Exportable
from sealion_jax.hardware import peak_flops_per_second
from sealion_jax.model.config import Gemma3Config, gemma3_1b, gemma3_4b
from sealion_jax.model.flops import flops_per_token
from sealion_jax.model.gemma3 import init_params

TOLERANCE = 1e-4
"""Of float32 losses around 10; the sums are taken in other orders."""

SMALL = Gemma3Config(
    vocab_size=32_768,
    num_layers=6,
    model_dim=640,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    feed_forward_dim=2048,
    sliding_window_tokens=512,
)
CPU_SHAPES = ((4, 512), (1, 2048))
GPU_MODELS = {"1b": gemma3_1b, "4b": gemma3_4b}
GPU_ROW_TOKENS = 8192
MEAN_DOCUMENT_TOKENS = 2048


def main() -> None:
    """Parses, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="make the peers' environments, and end")
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="besides sealion_jax")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--output", help="folder for the table as JSON, such as docs/figures")
    options = parser.parse_args()
    if options.install:
        install()
        return
    names = [OURS, *(name for name in options.only if name != OURS)]
    with tempfile.TemporaryDirectory() as folder:
        if options.gpu:
            result = measure_gpu(names, Path(folder), steps=10)
        else:
            result = measure_cpu(names, Path(folder), rounds=options.rounds, steps=options.steps)
    show(result)
    if options.output:
        name = "training_step_gpu" if options.gpu else "training_step"
        (Path(options.output) / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in result["table"]:
        assert row["name"] != REFERENCE or row.get("same_losses", True), "Transformers' losses are not ours"


def measure_cpu(names: Sequence[str], folder: Path, *, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens a second of each on a CPU, at each shape."""
    jax.config.update("jax_platforms", "cpu")
    missing = [name for name in names if not Path(PEERS[name].python()).exists()]
    if missing:
        print(f"left out, not installed: {', '.join(missing)} (--install makes their environments)")
    names = [name for name in names if name not in missing]
    before, weights = machine(), write_weights(SMALL, folder / "weights")
    table = []
    for rows, tokens in CPU_SHAPES:
        batch = random_batch(SMALL.vocab_size, rows, tokens, mean_document=None)
        job = make_job(SMALL, batch, folder, weights=weights)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(started(name, job, folder)) for name in names]
            seconds = take_turns(workers, rounds=rounds, steps=steps)
        table += [{"shape": f"{rows}x{tokens}", **row} for row in compare(workers, seconds, rows * tokens)]
    return {"machine": before, "dtype": "float32", "model": asdict(SMALL), "table": table}


def take_turns(workers: Sequence[Worker], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """For each worker, the median seconds of a step in each of its turns; another one begins each round."""
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for k in range(rounds):
        first = k % len(workers)
        for worker in (*workers[first:], *workers[:first]):
            seconds[worker.name].append(statistics.median(worker.take(steps)["seconds"]))
    return seconds


def compare(
    workers: Sequence[Worker], seconds: Mapping[str, Sequence[float]], tokens: int
) -> list[dict[str, Any]]:
    """A row for each worker; ratios are taken round by round."""
    ours = next(worker for worker in workers if worker.name == OURS).begun["losses"]
    table = []
    for worker in workers:
        mine = seconds[worker.name]
        times_as_fast = sorted(theirs / us for theirs, us in zip(mine, seconds[OURS], strict=True))
        losses = worker.begun["losses"]
        far = max(abs(loss - our) for loss, our in zip(losses, ours, strict=True))
        table.append(
            {
                "name": worker.name,
                "tokens_per_second": tokens / statistics.median(mine),
                "times_as_fast": statistics.median(times_as_fast),
                "times_as_fast_range": [times_as_fast[0], times_as_fast[-1]],
                "largest_difference_of_losses": far,
                "same_losses": worker.begun["same_weights"] and far <= TOLERANCE,
                "seconds": mine,
                **worker.begun,
            }
        )
    return table


def measure_gpu(names: Sequence[str], folder: Path, *, steps: int) -> dict[str, Any]:
    """Tokens a second, MFU and memory on a GPU; one process after another, each having all of it.

    The count of operations (for the MFU) has causality, windows and documents in it, and no recomputation.
    """
    before, kind = machine(), device_kind()
    table = []
    for size, config in GPU_MODELS.items():
        batch = random_batch(config().vocab_size, 1, GPU_ROW_TOKENS, mean_document=MEAN_DOCUMENT_TOKENS)
        job = replace(make_job(config(), batch, folder, weights=None), on_gpu=True)
        operations, peak = flops(config(), batch), peak_flops_per_second(kind)
        measured = {name: told for name in names if (told := first_that_fits(name, job, folder, steps))}
        medians = {name: statistics.median(told["seconds"]) for name, told in measured.items()}
        table += [
            {
                "shape": f"{size} 1x{GPU_ROW_TOKENS}",
                "name": name,
                "tokens_per_second": GPU_ROW_TOKENS / medians[name],
                "times_as_fast": medians[name] / medians[OURS] if OURS in medians else None,
                "times_as_fast_range": None,
                "mfu": None if peak is None else operations / medians[name] / peak,
                "peak_gib": (told["peak_bytes"] or 0) / 2**30,
                **told,
            }
            for name, told in measured.items()
        ]
    return {"machine": {**before, "gpu": kind}, "dtype": "bfloat16", "table": table}


def first_that_fits(name: str, job: Job, folder: Path, steps: int) -> dict[str, Any] | None:
    """What a worker told of itself and its steps, with the first options that fit into memory, if any."""
    for options in PEERS[name].on_gpu:
        try:
            with started(name, replace(job, options=options), folder) as worker:
                return {**worker.begun, **worker.take(steps)}
        except WorkerError as error:
            if not error.out_of_memory:
                raise
            print(f"{name}: out of memory with {options or 'nothing recomputed'}", flush=True)
    return None


def device_kind() -> str:
    """The GPU's name, asked of a process that lets go of its memory again."""
    code = "import jax; print(jax.devices('gpu')[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_weights(config: Gemma3Config, target: Path) -> str:
    """A directory of drawn weights in Hugging Face's form, float32."""
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(0))
    leaves = {
        "/".join(entry.key for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    source = Exportable(
        path=epath.Path(target),
        config=config,
        shapes={name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()},
        read=lambda name, index=(): leaves[name][index],
        tokenizer=None,
        chat_template=None,
        files={},
        record=None,
        untouched=(),
    )
    export_hf(source, target)
    return str(target)


def random_batch(vocab: int, rows: int, tokens: int, *, mean_document: int | None) -> Batch:
    """Rows of random tokens: each one document, or packed with documents of random lengths."""
    rng = np.random.default_rng(0)
    stream = rng.integers(4, vocab, (rows, tokens + 1)).astype(np.int32)
    starts = np.zeros((rows, tokens), bool)
    if mean_document is not None:
        starts = rng.random((rows, tokens)) < 1 / mean_document
    starts[:, 0] = True
    index = np.arange(tokens)
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return {
        "tokens": stream[:, :-1],
        "targets": stream[:, 1:],
        "positions": (index - first).astype(np.int32),
        "segment_ids": np.cumsum(starts, axis=1).astype(np.int32),
    }


def flops(config: Gemma3Config, batch: Batch) -> float:
    """Operations of a step on these documents."""
    lengths = [
        int(length) for row in batch["segment_ids"] for length in np.unique(row, return_counts=True)[1]
    ]
    return sum(length * flops_per_token(config, length) for length in lengths)


def make_job(config: Gemma3Config, batch: Batch, folder: Path, *, weights: str | None) -> Job:
    """The job of a model and a batch, which is written to a file."""
    file = folder / "batch.npz"
    np.savez(file, allow_pickle=False, **batch)
    rows, tokens = batch["tokens"].shape
    return Job(rows=rows, tokens=tokens, model=asdict(config), batch=str(file), weights=weights)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints the table as the docs have it."""
    on_gpu = any("mfu" in row for row in result["table"])
    print(result["machine"])
    print("| shape | | tokens/s | sealion_jax is |" + (" MFU | peak GiB |" if on_gpu else " same losses |"))
    print("| --- | --- | ---: | ---: |" + (" ---: | ---: |" if on_gpu else " --- |"))
    for row in result["table"]:
        spread = row["times_as_fast_range"]
        between = "" if spread is None else f" ({spread[0]:.2f} to {spread[1]:.2f})"
        own = row["name"] == OURS or row["times_as_fast"] is None
        ratio = "" if own else f"{row['times_as_fast']:.2f} times as fast{between}"
        if on_gpu:
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            last = f" {mfu} | {row['peak_gib']:.1f} |"
        else:
            last = f" {'yes' if row['same_losses'] else 'no'} |"
        print(f"| {row['shape']} | {row['name']} | {row['tokens_per_second']:.0f} | {ratio} |{last}")


if __name__ == "__main__":
    main()
