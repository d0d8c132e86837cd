"""`python -m sealion_kernels.tune`: times block sizes of attention on this machine's device, for the table.

    python -m sealion_kernels.tune                                Gemma 3's shapes, 2,048 to 32,768 tokens
    python -m sealion_kernels.tune --lengths 8192 --head-dims 256 --windows 512 global
    python -m sealion_kernels.tune --output kernels/tuned.json    adds to the table that the package reads
    SEALION_KERNELS_TUNED=own.json python ...                     reads another table, before that one

Candidates take turns, each pass apart, and the median counts. What is the fastest of each shape replaces the
table's entry for the same device and shape.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sealion_kernels.attention import BEST, IMPLEMENTATIONS
from sealion_kernels.block_table import AttentionBlocks, attention_blocks
from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu_blocks import GpuBlockSizes
from sealion_kernels.masks import AttentionMask
from sealion_kernels.targets import Target
from sealion_kernels.timing import calls_in_a_row, seconds_a_call
from sealion_kernels.tpu.geometry import Geometry
from sealion_kernels.tpu.vmem import fitted, for_backward, forward_bytes
from sealion_kernels.tuned import TABLE, USERS, Tuned, from_json, to_json

HEADS = {256: ((4, 1), (8, 4)), 128: ((32, 16),), 64: ((8, 2),)}
"""Query and key-value heads by head dim: those of 1B and 4B, of 27B, and some."""

PASSES = ("forward", "backward", "backward_queries")
"""Of AttentionBlocks; the last where an implementation has a kernel of its own for it."""

PACKAGED = Path(__file__).with_name(TABLE)

SECONDS_BETWEEN = 10.0
"""Two lines of progress."""

DOCUMENTS = 4
"""Segments in a row."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is tuned for."""

    length: int
    head_dim: int
    heads: tuple[int, int]
    """Of queries and of keys."""
    window: int | None

    @property
    def group(self) -> int:
        """Query heads for each key-value head."""
        return self.heads[0] // self.heads[1]

    def __str__(self) -> str:
        layer = "global" if self.window is None else f"window {self.window}"
        return f"T {self.length}, H {self.head_dim}, G {self.group}, {layer}"


def main(argv: Sequence[str]) -> int:
    """Times, prints, writes; the exit code."""
    options = _parse(argv)
    target = Target.here()
    name = options.implementation or BEST.get(target.platform, ("blockwise",))[0]
    if name in BEST and name != target.platform:
        print(
            f"error: {name} kernels run on a {name.upper()}, and JAX's device is {target.kind}",
            file=sys.stderr,
        )
        return 2
    for shape in shapes(options.lengths, options.head_dims, options.windows):
        found = tune(name, shape, target, repetitions=options.repetitions, tell=partial(print, flush=True))
        if options.output is not None:
            old = from_json(options.output.read_text()) if options.output.exists() else ()
            options.output.write_text(to_json(merged(old, [found])))
    if options.output is not None:
        print(f"written to {options.output}; the package reads {PACKAGED}, before it what {USERS} names")
    return 0


def shapes(
    lengths: Sequence[int], head_dims: Sequence[int], windows: Sequence[int | None]
) -> Iterator[Shape]:
    """Every length, head dim and layer, but windows that no row is longer than."""
    for length, head_dim, window in itertools.product(lengths, head_dims, windows):
        if window is None or window < length:
            for heads in HEADS[head_dim]:
                yield Shape(length=length, head_dim=head_dim, heads=heads, window=window)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sealion_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--implementation", choices=list(IMPLEMENTATIONS), help="default: this device's")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 256], choices=list(HEADS))
    parser.add_argument("--windows", type=_window, nargs="+", default=[None, 512, 1024], help="or global")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="table to add to, such as kernels/tuned.json")
    return parser.parse_args(argv)


def _window(word: str) -> int | None:
    return None if word == "global" else int(word)


def tune(name: str, shape: Shape, target: Target, *, repetitions: int, tell: Callable[[str], Any]) -> Tuned:
    """The fastest blocks of an implementation for a shape, among its candidates and the table's own.

    Raises:
        RuntimeError: the device can run none of them.
    """
    arrays, mask = _problem(shape, target)
    dtype = arrays[0].dtype
    default = attention_blocks(
        name,
        target,
        num_queries=shape.length,
        num_keys=shape.length,
        window=shape.window,
        head_dim=shape.head_dim,
        group=shape.group,
        itemsize=dtype.itemsize,
    )
    fastest = default
    for which in PASSES if default.backward_queries is not None else PASSES[:2]:
        as_run = partial(_as_run, name, which, default, arrays, mask)
        own = as_run(getattr(default, which))
        several = dict.fromkeys((own, *map(as_run, candidates(name, shape.length))))
        runs = {
            sizes: _runner(name, which, replace(fastest, **{which: sizes}), arrays, mask) for sizes in several
        }
        progress = _paced(lambda text, which=which: tell(f"{shape}, {which}: {text}"))
        timed = sorted(_medians(runs, repetitions, progress), key=lambda pair: pair[0])
        if not timed:
            raise RuntimeError(
                f"{target.kind} can run attention implementation {name!r}, {which}, for {shape} with none of "
                f"{len(runs)} block sizes; leave the shape out"
            )
        before = next((seconds for seconds, sizes in timed if sizes == own), math.nan)
        for seconds, sizes in timed[:3]:
            faster = f"{before / seconds:.2f} times as fast as the table's"
            tell(f"{shape}, {which}: {1e3 * seconds:8.2f} ms  {sizes}  {faster}")
        fastest = replace(fastest, **{which: timed[0][1]})
    return Tuned(
        implementation=name,
        kind=target.kind,
        head_dim=shape.head_dim,
        group=shape.group,
        window=shape.window,
        length=shape.length,
        itemsize=dtype.itemsize,
        forward=fastest.forward,
        backward=fastest.backward,
        backward_queries=fastest.backward_queries,
    )


def candidates(name: str, length: int) -> Iterator[BlockSizes]:
    """Block sizes to try for rows of a length."""
    if name == "gpu":
        for query, key, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)):
            yield GpuBlockSizes(query=query, key=key, num_warps=warps, num_stages=stages)
        return
    several = (128, 256, 512, 1024, 2048) if name == "tpu" else (64, 128, 256, 512)
    for query, key in itertools.product(several, several):
        if max(query, key) <= length and max(query, key) <= 4 * min(query, key):
            yield BlockSizes(query=query, key=key)


def _as_run(
    name: str,
    which: str,
    blocks: AttentionBlocks,
    arrays: list[jax.Array],
    mask: AttentionMask,
    sizes: BlockSizes,
) -> BlockSizes:
    """Sizes of a pass as a kernel runs with them: those of a TPU's are halved until they fit into VMEM."""
    if name != "tpu":
        return sizes
    of = Geometry.of(arrays[0], arrays[1], mask, sizes, scale=1.0)
    if which == "forward":
        return fitted(of, blocks.vmem_bytes, forward_bytes).sizes
    return for_backward(of, blocks.vmem_bytes, blocks.cores)[0].sizes


def merged(old: Sequence[Tuned], new: Sequence[Tuned]) -> list[Tuned]:
    """The old entries but those for which there are new ones, and the new ones; sorted."""

    def place(entry: Tuned) -> tuple[Any, ...]:
        shape = entry.head_dim, entry.group, entry.itemsize, entry.window or 0, entry.length
        return entry.implementation, entry.kind, *shape

    entries = {place(entry): entry for entry in (*old, *new)}
    return [entries[key] for key in sorted(entries)]


def _problem(shape: Shape, target: Target) -> tuple[list[jax.Array], AttentionMask]:
    """Query, key, value and a cotangent, bfloat16 (on a CPU float32), and a mask of packed documents."""
    N, K = shape.heads
    if target.platform == "cpu":
        N, K = N // K, 1
    dtype = jnp.float32 if target.platform == "cpu" else jnp.bfloat16
    rng = np.random.default_rng(0)
    heads = (N, K, K, N)
    arrays = [jnp.asarray(rng.normal(size=(1, shape.length, n, shape.head_dim)), dtype) for n in heads]
    ids = jnp.asarray(np.arange(shape.length)[None] * DOCUMENTS // shape.length, jnp.int32)
    return arrays, AttentionMask(window=shape.window, query_segments=ids, key_segments=ids)


def _runner(
    name: str,
    which: str,
    blocks: AttentionBlocks,
    arrays: list[jax.Array],
    mask: AttentionMask,
) -> partial[Any]:
    """A compiled pass with these blocks, called without arguments.

    Where gradients of queries have a kernel of their own, each of the two backward passes asks for what its
    kernel gives alone, and XLA leaves out the other one, whose results nobody reads.
    """
    implementation = IMPLEMENTATIONS[name]
    options = {"scale": arrays[0].shape[3] ** -0.5, "blocks": blocks, "interpret": False}
    q, k, v, d_out = arrays
    if which == "forward":
        run = jax.jit(lambda q, k, v: implementation.forward(q, k, v, mask, **options))
        return partial(run, q, k, v)
    numbers = jnp.zeros(q.shape[:3], jnp.float32)
    wanted = slice(None)
    if blocks.backward_queries is not None:
        wanted = slice(0, 1) if which == "backward_queries" else slice(1, 3)
    run = jax.jit(lambda *a: implementation.backward(*a[:3], mask, *a[3:], **options)[wanted])
    return partial(run, q, k, v, numbers + 10.0, numbers, d_out)


def _medians(
    runs: dict[BlockSizes, Callable[[], Any]], repetitions: int, tell: Callable[[str], Any]
) -> Iterator[tuple[float, BlockSizes]]:
    """Seconds of each, the candidates taking turns; those that the device cannot run are left out."""
    able = {}
    for number, (sizes, run) in enumerate(runs.items(), 1):
        try:
            jax.block_until_ready(run())
        except jax.errors.JaxRuntimeError:  # more memory than the device has for a block
            continue
        finally:
            tell(f"{number} of {len(runs)} candidates compiled")
        able[sizes] = run, calls_in_a_row(run)
    seconds: dict[BlockSizes, list[float]] = {sizes: [] for sizes in able}
    for repetition in range(repetitions):
        for sizes, (run, calls) in able.items():
            seconds[sizes].append(seconds_a_call(run, calls))
        tell(f"{repetition + 1} of {repetitions} repetitions of {len(able)} candidates")
    return ((statistics.median(times), sizes) for sizes, times in seconds.items())


def _paced(tell: Callable[[str], Any]) -> Callable[[str], None]:
    """`tell`, but at most once in `SECONDS_BETWEEN`."""
    last = time.monotonic()

    def paced(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN:
            last = time.monotonic()
            tell(text)

    return paced


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
