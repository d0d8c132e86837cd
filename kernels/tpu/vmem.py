"""How much of a TPU's vector memory a kernel takes, and block sizes that fit into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.precision import FLOAT32_BYTES
from sealion_kernels.tpu.geometry import LANES, Geometry

CHUNK = 512
"""Most keys (or queries) whose scores are held at once; the next ones' are multiplied meanwhile."""

DOUBLE = 2
"""Buffers of what is loaded or stored: one is moved while the other is worked with."""

LEAST_FUSED = 256
"""Tokens of a block below which the overhead of a step eats what one kernel for all gradients saves."""


def chunk_of(block: int) -> int:
    """Tokens of a chunk: the largest even part of the block that `CHUNK` allows, in whole `LANES`."""
    return next(size for size in range(min(block, CHUNK), 0, -LANES) if block % size == 0)


def forward_bytes(of: Geometry) -> int:
    """Of the forward kernel: queries and out, keys and values, and float32 sums."""
    queries, keys = _rows(of, of.sizes.query * of.group), _rows(of, of.sizes.key)
    loaded = DOUBLE * (2 * queries + 2 * keys)
    return loaded + _held_by_query(of) + _work(of, of.sizes.query, chunk_of(of.sizes.key))


def by_query_block_bytes(of: Geometry) -> int:
    """Of the kernel of the gradient of queries alone."""
    queries, keys = _rows(of, of.sizes.query * of.group), _rows(of, of.sizes.key)
    loaded = DOUBLE * (3 * queries + 2 * keys)
    return loaded + _held_by_query(of) + _work(of, of.sizes.query, chunk_of(of.sizes.key))


def by_key_block_bytes(of: Geometry, *, fused: bool) -> int:
    """Of the kernel of the gradients of keys and values, and, if fused, of queries."""
    queries, keys = _rows(of, of.sizes.query * of.group), _rows(of, of.sizes.key)
    loaded = DOUBLE * (2 * queries + 4 * keys)
    held = (
        2 * of.sizes.key * _lanes(of) * FLOAT32_BYTES + len(of.kinds) * of.sizes.key * LANES * FLOAT32_BYTES
    )
    if fused:
        row = of.group * of.query_blocks * of.sizes.query
        held += DOUBLE * _rows(of, row) + row * _lanes(of) * FLOAT32_BYTES
    return loaded + held + _work(of, of.sizes.key, chunk_of(of.sizes.query))


def fitted(of: Geometry, limit: int, *needs: Callable[[Geometry], int]) -> Geometry:
    """With blocks halved, the larger side first, until each kernel is within the limit, or at 128 tokens."""
    while max(need(of) for need in needs) > limit:
        query, key = of.sizes.query, of.sizes.key
        if max(query, key) <= LANES:
            break
        if query > LANES and (query * of.group >= key or key <= LANES):
            query = _half(query)
        else:
            key = _half(key)
        of = replace(of, sizes=BlockSizes(query=query, key=key))
    return of


def for_backward(of: Geometry, limit: int, cores: int) -> tuple[Geometry, bool]:
    """Blocks of the backward pass, and whether one kernel makes all gradients.

    It does where the gradient of a row's queries fits into VMEM beside blocks not too small, and rows
    and heads are enough for the cores: it goes through the blocks of keys in order, on one core.
    """
    fused = partial(by_key_block_bytes, fused=True)
    one = fitted(of, limit, fused)
    least = min(LEAST_FUSED, of.sizes.query, of.sizes.key)
    if (
        of.batch * of.num_kv_heads >= cores
        and fused(one) <= limit
        and min(one.sizes.query, one.sizes.key) >= least
    ):
        return one, True
    return fitted(of, limit, partial(by_key_block_bytes, fused=False), by_query_block_bytes), False


def _held_by_query(of: Geometry) -> int:
    """Two numbers and a sum for each query of a block, and its ids."""
    numbers = of.sizes.query * LANES * FLOAT32_BYTES
    sums = of.sizes.query * _lanes(of) * FLOAT32_BYTES
    return of.group * (2 * numbers + sums) + len(of.kinds) * numbers


def _work(of: Geometry, rows: int, columns: int) -> int:
    """What Mosaic keeps beside: scores and weights, and the parts into which it splits float32 factors.

    Read off libtpu 0.0.42: with how little memory kernels of many shapes still compile, and then some.
    """
    split = of.dtype.itemsize == FLOAT32_BYTES
    scores = (8 if split else 4) * rows * columns
    factors = 6 * (rows + columns) * _lanes(of) if split else 0
    return FLOAT32_BYTES * (scores + factors)


def _half(block: int) -> int:
    return max(LANES, block // 2 // LANES * LANES)


def _rows(of: Geometry, tokens: int) -> int:
    return tokens * _lanes(of) * of.dtype.itemsize


def _lanes(of: Geometry) -> int:
    return of.head_dim + -of.head_dim % LANES
