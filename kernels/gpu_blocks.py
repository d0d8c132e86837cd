"""Block sizes of the GPU kernels, by device, head dim and dtype.

Nothing here was timed on a device. The sizes come from compiling the kernels without one, for compute
capabilities 8.0 and 9.0: the largest tiles whose shared memory fits, and whose registers do not spill.
"""

from __future__ import annotations

from dataclasses import dataclass

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.targets import Target

SMALLEST = 16
"""Of a side of a tile, by what the tensor cores multiply at once."""


@dataclass(frozen=True, kw_only=True)
class GpuBlockSizes(BlockSizes):
    """A tile, how many warps of 32 threads work on it, and how many tiles are under way to shared memory."""

    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Of the three kernels."""

    forward: GpuBlockSizes
    keys: GpuBlockSizes
    """Gradients of keys and values: a block of keys stays, blocks of queries pass."""
    queries: GpuBlockSizes
    """Gradients of queries: a block of queries stays, blocks of keys pass."""


def tiles(target: Target, *, num_queries: int, num_keys: int, head_dim: int, itemsize: int) -> Tiles:
    """What the table has for a shape; never longer than the next power of two of a length."""
    table = FLOAT32 if itemsize > 2 else SMALL if _shared_memory(target) < 200_000 else LARGE
    entry = next(found for limit, found in table.items() if head_dim <= limit)
    forward, keys, queries = (_tile(*numbers, num_queries, num_keys) for numbers in entry)
    return Tiles(forward=forward, keys=keys, queries=queries)


def fitting(size: int, length: int) -> int:
    """`size`, or less where a shorter block holds the whole length."""
    return min(size, max(SMALLEST, 1 << (length - 1).bit_length()))


def _tile(query: int, key: int, warps: int, stages: int, num_queries: int, num_keys: int) -> GpuBlockSizes:
    return GpuBlockSizes(
        query=fitting(query, num_queries), key=fitting(key, num_keys), num_warps=warps, num_stages=stages
    )


def _shared_memory(target: Target) -> int:
    """Bytes that one block of threads can have.

    Source: CUDA C++ programming guide, technical specifications by compute capability: 227 KiB in 9.0 and
    10.0, 163 KiB in 8.0, 99 KiB in 8.6 and 8.9. A kind that is not known is taken for the smallest.
    """
    large = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300")
    return 227 << 10 if any(name in target.kind for name in large) else 99 << 10


# By the largest head dim: (queries, keys, warps, stages) of the forward pass, of the gradients of keys and
# values, and of the gradients of queries.
LARGE = {
    64: ((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    128: ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2)),
    256: ((128, 64, 8, 2), (32, 64, 8, 2), (64, 32, 4, 2)),
}
SMALL = {
    64: ((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    128: ((64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
    256: ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
FLOAT32 = {
    64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    256: ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
