"""Of the blocks that a block meets, which need the mask: known before a kernel runs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sealion_kernels.blocks import (
    BlockSizes,
    block_distances,
    extremes,
    key_ranges,
    num_blocks,
    query_ranges,
)
from sealion_kernels.masks import AttentionMask


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """For each block, the three stretches of blocks of the other side that its loop goes through.

    Between bounds 1 and 2 every block is wholly seen, and full, so that neither mask nor bounds need be
    looked at; before (from 0) and after (to 3) the mask is computed.
    """

    bounds: Int[Array, "#B blocks 4"]
    before: bool
    """Whether any block has a first stretch, whatever the mask's arrays hold; else no loop is made for it."""
    after: bool


def key_stretches(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> Stretches:
    """For each block of queries, the blocks of keys that it meets."""
    full = (np.arange(num_blocks(num_keys, sizes.key)) + 1) * sizes.key <= num_keys
    return _stretches(mask, num_queries, num_keys, sizes, full, by_key=False)


def query_stretches(mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> Stretches:
    """For each block of keys, the blocks of queries that it meets."""
    full = (np.arange(num_blocks(num_queries, sizes.query)) + 1) * sizes.query <= num_queries
    return _stretches(mask, num_queries, num_keys, sizes, full, by_key=True)


def wholly_seen(
    mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes
) -> Bool[Array, "#B queries keys"]:
    """Whether every query of one block surely sees every key of another; never True where one does not."""
    distances = block_distances(mask, num_queries, num_keys, sizes)
    seen = reduce(np.logical_and, mask.all_within(distances), np.ones(distances.least.shape, bool))
    seen = jnp.asarray(seen)[None]
    if mask.query_segments is not None and mask.key_segments is not None:
        (least_q, largest_q), (least_k, largest_k) = (
            extremes(mask.query_segments, sizes.query),
            extremes(mask.key_segments, sizes.key),
        )
        one = (least_q == largest_q)[:, :, None] & (least_k == largest_k)[:, None, :]
        seen &= one & (least_q[:, :, None] == least_k[:, None, :])
    return seen


def _stretches(
    mask: AttentionMask,
    num_queries: int,
    num_keys: int,
    sizes: BlockSizes,
    full: np.ndarray,
    *,
    by_key: bool,
) -> Stretches:
    known = mask.query_segments is None and not mask.has_spans
    with jax.ensure_compile_time_eval() if known else nullcontext():
        whole = wholly_seen(mask, num_queries, num_keys, sizes)
        ranges = (query_ranges if by_key else key_ranges)(mask, num_queries, num_keys, sizes)
        bounds = _bounds(whole.swapaxes(1, 2) if by_key else whole, full, *ranges)
    if not known:
        return Stretches(bounds=bounds, before=True, after=True)
    numbers = np.asarray(bounds)
    before, after = numbers[..., 1] > numbers[..., 0], numbers[..., 3] > numbers[..., 2]
    return Stretches(bounds=bounds, before=bool(before.any()), after=bool(after.any()))


def _bounds(
    whole: Bool[Array, "#B blocks others"], full: np.ndarray, start: Array, stop: Array
) -> Int[Array, "#B blocks 4"]:
    """The ends of a range, and of the first run of wholly seen full blocks inside it (empty at its start)."""
    index = jnp.arange(whole.shape[-1])
    inside = (index >= start[..., None]) & (index < stop[..., None])
    whole = whole & full & inside
    first = jnp.where(whole.any(-1), jnp.argmax(whole, -1), start)
    broken = ~whole & (index >= first[..., None])
    after = jnp.where(broken.any(-1), jnp.argmax(broken, -1), index.size)
    after = jnp.where(whole.any(-1), after, start)
    return jnp.stack(jnp.broadcast_arrays(start, first, after, stop), -1).astype(jnp.int32)
