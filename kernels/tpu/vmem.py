"""How much of a TPU's vector memory a kernel takes, and block sizes that fit into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.tpu.geometry import LANES, Geometry

CHUNK = 512
"""Most keys (or queries) whose scores are held at once; the next ones' are multiplied meanwhile."""

SCORES = 6
"""Float32 matrices of the size of a chunk's scores that a kernel may hold at once."""

DOUBLE = 2
"""Buffers of what is loaded or stored: one is moved while the other is worked with."""

FLOAT32 = 4


def chunk_of(block: int) -> int:
    """Tokens of a chunk: the largest even part of the block that `CHUNK` allows, in whole `LANES`."""
    return next(size for size in range(min(block, CHUNK), 0, -LANES) if block % size == 0)


def forward_bytes(of: Geometry) -> int:
    """Of the forward kernel: queries and out, keys and values, and float32 sums."""
    queries, keys = _rows(of, of.sizes.query * of.group), _rows(of, of.sizes.key)
    loaded = DOUBLE * (2 * queries + 2 * keys)
    numbers = of.sizes.query * LANES * FLOAT32
    held = of.group * (2 * numbers + of.sizes.query * _lanes(of) * FLOAT32) + len(of.kinds) * numbers
    return loaded + held + SCORES * FLOAT32 * of.sizes.query * chunk_of(of.sizes.key)


def by_key_block_bytes(of: Geometry, *, fused: bool) -> int:
    """Of the kernel of the gradients of keys and values, and, if fused, of queries."""
    queries, keys = _rows(of, of.sizes.query * of.group), _rows(of, of.sizes.key)
    loaded = DOUBLE * (2 * queries + 4 * keys)
    held = 2 * of.sizes.key * _lanes(of) * FLOAT32 + len(of.kinds) * of.sizes.key * LANES * FLOAT32
    if fused:
        row = of.group * of.query_blocks * of.sizes.query
        held += DOUBLE * _rows(of, row) + row * _lanes(of) * FLOAT32
    return loaded + held + SCORES * FLOAT32 * of.sizes.key * chunk_of(of.sizes.query)


def by_query_block_bytes(of: Geometry) -> int:
    """Of the kernel of the gradient of queries alone."""
    queries, keys = _rows(of, of.sizes.query * of.group), _rows(of, of.sizes.key)
    loaded = DOUBLE * (3 * queries + 2 * keys)
    numbers = of.sizes.query * LANES * FLOAT32
    held = of.group * (2 * numbers + of.sizes.query * _lanes(of) * FLOAT32) + len(of.kinds) * numbers
    return loaded + held + SCORES * FLOAT32 * of.sizes.query * chunk_of(of.sizes.key)


def fitted(of: Geometry, limit: int, *needs: Callable[[Geometry], int]) -> Geometry:
    """With blocks halved, the longer side first, until each kernel's need is within the limit."""
    while max(need(of) for need in needs) > limit:
        query, key = of.sizes.query, of.sizes.key
        if max(query * of.group, key) <= LANES * of.group and query <= LANES:
            break
        if query * of.group >= key and query > LANES:
            query = _half(query)
        else:
            key = _half(key)
        of = replace(of, sizes=BlockSizes(query=query, key=key))
    return of


def _half(block: int) -> int:
    return max(LANES, block // 2 // LANES * LANES)


def _rows(of: Geometry, tokens: int) -> int:
    return tokens * _lanes(of) * of.dtype.itemsize


def _lanes(of: Geometry) -> int:
    return of.head_dim + -of.head_dim % LANES
