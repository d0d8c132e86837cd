"""Which blocks of queries and keys a mask lets meet: computed once, read by every blockwise implementation.

A block that causality, the window, the segments or the spans exclude as a whole is not loaded. What a
mask's numbers exclude (causality, window) is known when a kernel is traced, what its arrays exclude
(segments, spans) when it runs: so the ranges are arrays, small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sealion_kernels.masks import AttentionMask, Distances

LARGEST = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Tokens of a block of queries and of a block of keys."""

    query: int
    key: int


class Ranges(NamedTuple):
    """For each block, the first and one past the last block of the other side that it meets, int32.

    A block that meets none has an empty range. Inside a range there may be blocks that do not meet, where
    segments come back after others; there the mask hides all.
    """

    start: Int[Array, "#B blocks"]
    stop: Int[Array, "#B blocks"]


def num_blocks(length: int, block: int) -> int:
    """Blocks that `length` tokens make, the last one perhaps not full."""
    return -(-length // block)


def key_ranges(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> Ranges:
    """For each block of queries, the blocks of keys that it meets."""
    return _ranges(meeting(mask, num_queries, num_keys, sizes))


def query_ranges(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> Ranges:
    """For each block of keys, the blocks of queries that it meets."""
    return _ranges(meeting(mask, num_queries, num_keys, sizes).swapaxes(1, 2))


def most_key_blocks(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> int:
    """The most blocks of keys that any block of queries meets, whatever the mask's arrays hold."""
    return int(_by_numbers(mask, num_queries, num_keys, sizes).sum(1).max())


def most_query_blocks(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> int:
    """The most blocks of queries that any block of keys meets, whatever the mask's arrays hold."""
    return int(_by_numbers(mask, num_queries, num_keys, sizes).sum(0).max())


def meeting(
    mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes
) -> Bool[Array, "#B queries keys"]:
    """Whether a query of one block may see a key of another; never False where one does."""
    ahead = _by_numbers(mask, num_queries, num_keys, sizes)
    if mask.query_spans is not None and mask.key_spans is not None and mask.has_spans:
        causal = _by_numbers(mask.numbers, num_queries, num_keys, sizes)
        queries = extremes(mask.query_spans, sizes.query, above=0)
        keys = extremes(mask.key_spans, sizes.key, above=0)
        seen = jnp.asarray(causal)[None] | (jnp.asarray(ahead)[None] & _overlap(queries, keys))
    else:
        seen = jnp.asarray(ahead)[None]
    if mask.query_segments is not None and mask.key_segments is not None:
        queries, keys = extremes(mask.query_segments, sizes.query), extremes(mask.key_segments, sizes.key)
        seen &= _overlap(queries, keys)
    return seen


def _by_numbers(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> np.ndarray:
    """Whether blocks are within reach of each other, bool [query blocks, key blocks]; spans anywhere."""
    distances = block_distances(mask, num_queries, num_keys, sizes)
    every = mask.some_within(distances, spans=mask.has_spans)
    return reduce(np.logical_and, every, np.ones(distances.least.shape, bool))


def block_distances(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> Distances:
    """Of each block of queries and each of keys, [query blocks, key blocks]; the last ones may be short."""
    q = np.arange(0, num_queries, sizes.query)[:, None]
    k = np.arange(0, num_keys, sizes.key)[None, :]
    lengths = np.minimum(sizes.query, num_queries - q), np.minimum(sizes.key, num_keys - k)
    return mask.distances(q, k, *lengths)


def extremes(ids: Int[Array, "B L"], block: int, *, above: int | None = None) -> tuple[Array, Array]:
    """The least and the largest id of each block, [B, blocks], or (max, -max) where there is none.

    Args:
        above: counts only ids above it.
    """
    length = ids.shape[1]
    counted = jnp.arange(length + -length % block) < length
    ids = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, -length % block)))
    if above is not None:
        counted = counted & (ids > above)
    shape = (ids.shape[0], -1, block)
    least = jnp.where(counted, ids, LARGEST).reshape(shape).min(-1)
    largest = jnp.where(counted, ids, -LARGEST).reshape(shape).max(-1)
    return least, largest


def _overlap(queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Bool[Array, "B queries keys"]:
    """Whether the intervals of ids have anything in common."""
    return (queries[0][:, :, None] <= keys[1][:, None, :]) & (keys[0][:, None, :] <= queries[1][:, :, None])


def _ranges(met: Bool[Array, "#B blocks others"]) -> Ranges:
    others = met.shape[-1]
    start = jnp.argmax(met, axis=-1)
    stop = others - jnp.argmax(met[..., ::-1], axis=-1)
    none = ~met.any(-1)
    empty = jnp.zeros_like(start)
    return Ranges(
        jnp.where(none, empty, start).astype(jnp.int32), jnp.where(none, empty, stop).astype(jnp.int32)
    )


def cut(array: jax.Array, block: int, *, axis: int) -> jax.Array:
    """`array` with `axis` split into (blocks, block), zero-padded at its end."""
    length = array.shape[axis]
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, -length % block)
    array = jnp.pad(array, pad) if length % block else array
    return array.reshape(*array.shape[:axis], -1, block, *array.shape[axis + 1 :])
