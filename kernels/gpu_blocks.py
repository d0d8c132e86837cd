"""Block sizes of the GPU kernels, by device, head dim and dtype.

Nothing here was timed on a device. The sizes come from compiling the kernels without one (their Triton code,
by Triton 3.9, for compute capabilities 8.0 and 9.0; documents in the mask): among the tiles whose shared
memory fits and whose registers do not spill, large ones. What each takes is written beside it, in KiB of
shared memory and registers a thread; in 10.0 those for 9.0 fit as well. XLA has a Triton of its own, so on a
device both may differ somewhat.

Shared memory holds, but for a KiB, the tiles that stay (queries; keys and values; queries and gradients of
the output) and, once for each stage, the two that pass; of float32, which is multiplied outside the tensor
cores, also the scores, and in the gradients of keys and values the gradients of scores. It is less where
factors stay in registers, as many do before 9.0.
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
    memory = _shared_memory(target)
    table = FLOAT32 if itemsize > 2 else next(table for least, table in BY_MEMORY.items() if memory >= least)
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
    """KiB that one block of threads can have.

    Source: CUDA C++ programming guide, technical specifications by compute capability: 227 in 9.0 and 10.0,
    163 in 8.0, 99 in 8.6 and 8.9. A kind that is not known is taken for the smallest.
    """
    known = {
        227: ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300"),
        163: ("A100", "A800", "A30"),
    }
    words = target.kind.replace("-", " ").split()
    return next((kib for kib, names in known.items() if any(name in words for name in names)), 99)


# By the largest head dim: (queries, keys, warps, stages) of the forward pass, of the gradients of keys and
# values, and of the gradients of queries.
HOPPER = {
    64: (
        (128, 64, 4, 3),  # 65 KiB, 226
        (64, 64, 4, 2),  # 49 KiB, 223
        (64, 64, 4, 2),  # 49 KiB, 143
    ),
    128: (
        (128, 64, 8, 3),  # 129 KiB, 195
        (64, 64, 8, 2),  # 97 KiB, 237
        (64, 64, 4, 2),  # 97 KiB, 191
    ),
    256: (
        (128, 64, 8, 2),  # 192 KiB, 234
        (32, 64, 8, 2),  # 128 KiB, 255, and 28 spilled: with 16 queries none, with 32 keys no wgmma
        (128, 32, 8, 2),  # 192 KiB, 223
    ),
}
AMPERE = {
    64: (
        (128, 64, 4, 3),  # 48 KiB, 250
        (64, 64, 4, 2),  # 33 KiB, 255
        (64, 64, 4, 2),  # 32 KiB, 187
    ),
    128: (
        (128, 64, 8, 3),  # 96 KiB, 238
        (64, 64, 8, 2),  # 73 KiB, 176
        (64, 64, 8, 2),  # 72 KiB, 166
    ),
    256: (
        (64, 64, 8, 2),  # 104 KiB, 246
        (32, 64, 8, 2),  # 100 KiB, 255
        (64, 32, 8, 2),  # 100 KiB, 169
    ),
}
SMALL = {
    64: AMPERE[64],
    128: (
        (128, 64, 8, 2),  # 64 KiB, 227
        (64, 64, 8, 2),  # 73 KiB, 176
        (64, 64, 8, 2),  # 72 KiB, 166
    ),
    256: (
        (64, 32, 8, 2),  # 68 KiB, 175
        (32, 32, 8, 2),  # 66 KiB, 165
        (32, 32, 8, 2),  # 66 KiB, 125
    ),
}
BY_MEMORY = {227: HOPPER, 163: AMPERE, 0: SMALL}

# Float32 is multiplied outside the tensor cores, for those who compare numbers: tiles that fit anywhere.
FLOAT32 = {
    64: (
        (32, 32, 4, 1),  # 20 KiB, 168
        (32, 32, 4, 1),  # 40 KiB, 224
        (32, 32, 4, 1),  # 32 KiB, 213
    ),
    128: (
        (32, 16, 4, 1),  # 26 KiB, 167
        (16, 16, 4, 1),  # 34 KiB, 128
        (32, 16, 4, 1),  # 48 KiB, 116
    ),
    256: (
        (16, 32, 4, 1),  # 50 KiB, 254
        (16, 16, 4, 1),  # 66 KiB, 165
        (16, 16, 4, 1),  # 64 KiB, 132
    ),
}
