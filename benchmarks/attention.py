"""Attention beside its peers: forward and backward, on whatever device is at hand.

    python benchmarks/attention.py [--output DIR] [--lengths 1024 2048] [--head-dims 128] [--repetitions N]
    python benchmarks/attention.py --documents 8         rows packed of 8 documents, as training has them

On a CPU: ours (blockwise), dense, and `jax.nn.dot_product_attention`. On a GPU: the gpu kernel beside
cuDNN, tokamax where it is installed, blockwise and dense. On a TPU: the tpu kernel beside splash attention
with three sizes of blocks, blockwise and dense. A contender that refuses a case or would need too much
memory is left out of the table, and the reason is printed; so is one that differs by more than rounding
from the truth, dense (or blockwise, where all scores would not fit) in float32, but for ours, with which it
fails.

All take turns: in each repetition every contender runs once, so what else the machine does disturbs them
alike, and ratios are medians over repetitions. FLOPs are those of the seen pairs of queries and keys (so half
of them under causality, and a window's in a window): 4 for each pair, head and head dim forward, 10 backward.
The second table has ours alone, at one length, over windows: time beside work.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiments import report

from sealion_kernels import AttentionMask, Target, flash_attention
from sealion_kernels.timing import calls_in_a_row, seconds_a_call

FLOPS_A_PAIR = 4 + 10
LOCAL = 1024
WINDOWS = (256, 512, 1024, 2048)
MOST_DENSE_BYTES = {"cpu": 1 << 30, "gpu": 16 << 30, "tpu": 4 << 30}
"""Of one array of scores, float32; a contender that keeps several of them is not asked for more."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape; causal."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    dtype: str
    documents: int = 1
    """Of the same length, that a row is packed of; they see nothing of each other."""

    def __str__(self) -> str:
        where = "global" if self.window is None else f"window {self.window}"
        packed = f", {self.documents} documents" if self.documents > 1 else ""
        return f"T {self.length}, H {self.head_dim}, {where}{packed}"

    @property
    def flops(self) -> int:
        """Of forward and backward."""
        length = self.length // self.documents
        reach = min(self.window or length, length)
        pairs = self.documents * (length * reach - reach * (reach - 1) // 2)
        return FLOPS_A_PAIR * pairs * self.batch * self.heads * self.head_dim

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

    @property
    def segments(self) -> jax.Array | None:
        """The document of each token."""
        if self.documents == 1:
            return None
        ids = jnp.arange(self.length, dtype=jnp.int32) // (self.length // self.documents)
        return jnp.broadcast_to(ids, (self.batch, self.length))

    @property
    def score_bytes(self) -> int:
        """Of all scores, float32."""
        return 4 * self.batch * self.heads * self.length**2

    def inputs(self) -> tuple[jax.Array, ...]:
        """Query, key, value and the cotangent of the output."""
        rng = np.random.default_rng(0)
        q = (self.batch, self.length, self.heads, self.head_dim)
        k = (self.batch, self.length, self.kv_heads, self.head_dim)
        return tuple(jnp.asarray(rng.normal(size=shape), self.dtype) for shape in (q, k, k, q))


def main() -> None:
    """Parses, measures, prints, and writes."""
    target = Target.here()
    default = (1024, 2048, 4096, 8192) if target.platform == "cpu" else (2048, 4096, 8192, 16384, 32768)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=default)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--documents", type=int, default=1, help="that each row is packed of")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--windows-at", type=int, help="the length at which windows are compared")
    parser.add_argument("--output", type=Path, help="a folder for attention.json and attention_windows.json")
    args = parser.parse_args()
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    facts = {"device": target.kind, "jax": jax.__version__, "repetitions": args.repetitions}
    peers = contenders(target)
    rows, left_out = [], {}
    for whole in cases(target, args.lengths, args.head_dims):
        case = replace(whole, documents=args.documents)
        found = rows_of(case, measured(case, peers, args.repetitions, left_out))
        print(" ".join(f"{row['case']} {row['milliseconds']:.1f} ms" for row in found), flush=True)
        rows += found
    report("attention", {"table": rows, **facts, "left_out": left_out}, args.output)
    length = args.windows_at or max(args.lengths)
    table = windows(target, length, args.head_dims[-1], peers, args.repetitions)
    report("attention_windows", {"table": table, **facts, "length": length}, args.output)


def cases(target: Target, lengths: Sequence[int], head_dims: Sequence[int]) -> Iterator[Case]:
    """Every length, head dim, and global and local attention."""
    for head_dim in head_dims:
        for length in lengths:
            for window in (None, LOCAL):
                if window is None or window < length:
                    yield shape(target, length, head_dim, window)


def shape(target: Target, length: int, head_dim: int, window: int | None) -> Case:
    """Heads of Gemma 3: of the 1B model on a CPU (fewer of them), of 4B and 27B elsewhere."""
    if target.platform == "cpu":
        heads, dtype = (2, 1), "float32"
    else:
        heads, dtype = ((8, 4) if head_dim == 256 else (32, 16)), "bfloat16"
    return Case(
        batch=1,
        length=length,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        window=window,
        dtype=dtype,
    )


def contenders(target: Target) -> dict[str, Callable[[Case], Callable]]:
    """By name, what makes a function of query, key and value for a case; ours is the first."""
    found: dict[str, Callable[[Case], Callable]] = {}
    if target.platform in ("gpu", "tpu"):
        found[target.platform] = partial(_ours, target.platform)
    found["blockwise"] = partial(_ours, "blockwise")
    if target.platform == "gpu":
        found["cudnn"] = partial(_by_jax_nn, jax.nn.dot_product_attention, "cudnn")
        try:
            import tokamax  # pyright: ignore[reportMissingImports]
        except ImportError:
            print("tokamax is not installed")
        else:
            found["tokamax"] = partial(_by_jax_nn, tokamax.dot_product_attention, None)
    elif target.platform == "tpu":
        found |= {f"splash, blocks of {size}": partial(_splash, size) for size in SPLASH_BLOCKS}
    else:
        found["jax.nn"] = partial(_by_jax_nn, jax.nn.dot_product_attention, "xla")
    found["dense"] = partial(_ours, "dense")
    return found


QUADRATIC = ("dense", "jax.nn")

SPLASH_BLOCKS = (256, 512, 1024)
SPLASH_SIDES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)


def _ours(implementation: Any, case: Case) -> Callable:
    ids = case.segments
    mask = AttentionMask(window=case.window, query_segments=ids, key_segments=ids)
    return partial(flash_attention, mask=mask, scale=case.scale, implementation=implementation)


def _by_jax_nn(attention: Callable, implementation: str | None, case: Case) -> Callable:
    if case.documents > 1:
        raise ValueError("it takes no segments but as a mask of all pairs")
    return partial(
        attention,
        scale=case.scale,
        is_causal=True,
        local_window_size=None if case.window is None else (case.window - 1, 0),
        implementation=implementation,
    )


def _splash(block: int, case: Case) -> Callable:
    """Splash attention takes heads first, one row of the batch at a time, and no scale.

    Its own default, blocks of 128, is the slowest.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    square = (case.length, case.length)
    mask = (
        splash_attention_mask.CausalMask(square)
        if case.window is None
        else splash_attention_mask.LocalMask(square, (case.window - 1, 0), 0)
    )
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([mask] * case.heads),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(SPLASH_SIDES, block)),
        head_shards=1,
        q_seq_shards=1,
    )
    ids = case.segments
    segments = None if ids is None else splash_attention_kernel.SegmentIds(q=ids, kv=ids)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        by_head = [x.swapaxes(1, 2) for x in (query * case.scale, key, value)]
        out: Any = jax.vmap(kernel)(*by_head, segments)
        return out.swapaxes(1, 2)

    return attend


def measured(
    case: Case, peers: dict[str, Callable[[Case], Callable]], repetitions: int, left_out: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds of each contender's forward and backward, in each repetition; ours first."""
    q, k, v, d_out = inputs = case.inputs()
    ready: dict[str, Callable] = {}
    truth = true_answers(case)
    for name, make in peers.items():
        if name in QUADRATIC and case.score_bytes > MOST_DENSE_BYTES[Target.here().platform]:
            left_out[f"{case}: {name}"] = f"its scores would take {case.score_bytes >> 20} MiB"
            continue
        try:
            run = _both_passes(make(case)).lower(*inputs).compile()
            answer = [np.asarray(x, np.float32) for x in jax.block_until_ready(run(q, k, v, d_out))]
        except Exception as error:  # what a peer cannot do it says in its own way
            if not ready:
                raise
            left_out[f"{case}: {name}"] = f"{type(error).__name__}: {error}"[:200]
            continue
        apart = max(_apart(a, b) for a, b in zip(answer, truth, strict=True))
        if apart > (1e-4 if case.dtype == "float32" else 5e-2):
            if not ready:
                raise ValueError(f"{case}: {name} differs by {apart:.1e} from the truth")
            left_out[f"{case}: {name}"] = f"it differs by {apart:.1e}"
            continue
        ready[name] = run
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    runs = {name: partial(run, *inputs) for name, run in ready.items()}
    calls = {name: calls_in_a_row(run) for name, run in runs.items()}
    for _ in range(repetitions):
        for name, run in runs.items():
            seconds[name].append(seconds_a_call(run, calls[name]))
    return seconds


def true_answers(case: Case) -> list[np.ndarray]:
    """Output and gradients of the same inputs in float32, by the plainest code whose scores fit."""
    fits = case.score_bytes <= MOST_DENSE_BYTES[Target.here().platform]
    attend = _ours("dense" if fits else "blockwise", case)
    inputs = (x.astype(jnp.float32) for x in case.inputs())
    return [np.asarray(x) for x in _both_passes(attend)(*inputs)]


def _both_passes(attend: Callable) -> Any:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    return jax.jit(run)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def rows_of(case: Case, seconds: dict[str, list[float]]) -> list[dict]:
    """A row for each contender: its median time, and the median of its ratio to ours in a repetition."""
    ours = next(iter(seconds.values()))
    return [
        {
            "case": f"{case}: {name}",
            "milliseconds": 1e3 * statistics.median(times),
            "time_over_ours": statistics.median(a / b for a, b in zip(times, ours, strict=True)),
            "gflops_per_second": case.flops / statistics.median(times) / 1e9,
        }
        for name, times in seconds.items()
    ]


def windows(target: Target, length: int, head_dim: int, ours: dict, repetitions: int) -> list[dict]:
    """Ours alone, at one length, over windows: time and work, both over those of a global layer."""
    all_cases = [
        shape(target, length, head_dim, window) for window in (*(w for w in WINDOWS if w < length), None)
    ]
    runs = []
    for case in all_cases:
        inputs = case.inputs()
        run = _both_passes(next(iter(ours.values()))(case)).lower(*inputs).compile()
        runs.append((partial(run, *inputs), calls_in_a_row(partial(run, *inputs))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repetitions):
        for mine, (run, calls) in zip(times, runs, strict=True):
            mine.append(seconds_a_call(run, calls))
    whole = all_cases[-1]
    return [
        {
            "case": str(case),
            "milliseconds": 1e3 * statistics.median(mine),
            "time_of_global": statistics.median(a / b for a, b in zip(mine, times[-1], strict=True)),
            "work_of_global": case.flops / whole.flops,
            "microseconds_per_window_token": 1e6 * statistics.median(mine) / (case.window or case.length),
        }
        for case, mine in zip(all_cases, times, strict=True)
    ]


if __name__ == "__main__":
    main()
