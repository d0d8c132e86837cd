"""Attention block by block in plain XLA: memory linear in the length, hidden blocks never computed.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2; grouped query heads ride along in the
rows of a block, so keys are never repeated. Runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.blocks import BlockSizes, cut, key_ranges, query_ranges
from sealion_kernels.masks import AttentionMask, Ids
from sealion_kernels.precision import exact
from sealion_kernels.softmax import MASKED


def refusal(query: Array, key: Array, mask: AttentionMask) -> str | None:
    """None: there is nothing that this implementation cannot do."""
    del query, key, mask
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    scale: float,
    blocks: AttentionBlocks,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Mixed values in the query's dtype, and the log-sum-exp of the scores, float32."""
    del interpret
    if _rows_differ(mask, query):
        one_row = partial(forward, scale=scale, blocks=blocks)
        return _row_by_row(one_row, query, key, value, mask)
    B, T, N, H = query.shape
    K = key.shape[2]
    plan = _Plan.make(mask, T, key.shape[1], blocks.forward)
    q, k, v = (
        _grouped(query, K, plan.sizes.query),
        _by_head(key, plan.sizes.key),
        _by_head(value, plan.sizes.key),
    )
    first, last = (x[0] for x in key_ranges(mask, T, key.shape[1], plan.sizes))  # one for all rows

    def query_block(_, i):
        q_i = _block(q, i)

        def key_block(j, carry):
            top, total, mixed = carry
            seen = plan.seen(i, j)
            scores = jnp.where(seen, _scores(q_i, _block(k, j)) * scale, MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            fade = jnp.exp(top - new_top)
            v_j = _block(v, j)
            mixed = mixed * fade[..., None] + exact("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v_j)
            return new_top, total * fade + weights.sum(-1), mixed

        # Made from q_i, so that under `shard_map` they vary over the devices as what is added to them does.
        zeros = jnp.zeros_like(q_i, jnp.float32)
        start = (zeros[..., 0] + MASKED, zeros[..., 0], zeros)
        top, total, mixed = lax.fori_loop(first[i], last[i], key_block, start)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        return None, (
            (mixed / safe[..., None]).astype(q.dtype),
            jnp.where(some, top + jnp.log(safe), -jnp.inf),
        )

    _, (out, log_sum) = lax.scan(query_block, None, jnp.arange(q.shape[2]))
    # [blocks, B, K, G, block, ...] -> [B, T, N, ...]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, H)[:, :T]
    return out, log_sum.transpose(1, 0, 4, 2, 3).reshape(B, -1, N)[:, :T]


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    log_sum: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    *,
    scale: float,
    blocks: AttentionBlocks,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key and value, each in its dtype.

    Args:
        log_sum: as `forward` gave it.
        delta: for each query, sum(out * d_out), less the cotangent of `log_sum`.
    """
    del interpret
    if _rows_differ(mask, query):
        one_row = partial(backward, scale=scale, blocks=blocks)
        return _row_by_row(one_row, query, key, value, mask, log_sum, delta, d_out)
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    plan = _Plan.make(mask, T, S, blocks.backward)
    size = plan.sizes.query
    q, d_out = _grouped(query, K, size), _grouped(d_out, K, size)
    log_sum, delta = (_grouped(x[..., None], K, size)[..., 0] for x in (log_sum, delta))
    k, v = _by_head(key, plan.sizes.key), _by_head(value, plan.sizes.key)
    first, last = (x[0] for x in query_ranges(mask, T, S, plan.sizes))

    def key_block(dq, j):
        k_j, v_j = _block(k, j), _block(v, j)

        def query_block(i, carry):
            dq, dk_j, dv_j = carry
            q_i, d_out_i = _block(q, i), _block(d_out, i)
            scores = _scores(q_i, k_j) * scale
            weights = jnp.where(plan.seen(i, j), jnp.exp(scores - _block(log_sum, i)[..., None]), 0.0)
            d_weights = exact("BKGTH,BKSH->BKGTS", d_out_i, v_j)
            d_scores = weights * (d_weights - _block(delta, i)[..., None]) * scale
            weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
            dv_j += exact("BKGTS,BKGTH->BKSH", weights, d_out_i)
            dk_j += exact("BKGTS,BKGTH->BKSH", d_scores, q_i)
            dq_i = exact("BKGTS,BKSH->BKGTH", d_scores, k_j)
            dq = lax.dynamic_update_index_in_dim(dq, _block(dq, i) + dq_i, i, 2)
            return dq, dk_j, dv_j

        zeros = jnp.zeros_like(k_j, jnp.float32)
        dq, dk_j, dv_j = lax.fori_loop(first[j], last[j], query_block, (dq, zeros, zeros))
        return dq, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros_like(q, jnp.float32), jnp.arange(k.shape[2]))
    dq = dq.astype(q.dtype).transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, N, H)[:, :T]
    dk, dv = (x.transpose(1, 0, 3, 2, 4).reshape(B, -1, K, H)[:, :S] for x in (dk, dv))
    return dq, dk, dv


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How queries and keys are cut into blocks, and what of a pair of blocks the mask shows."""

    mask: AttentionMask
    num_keys: int
    sizes: BlockSizes
    segments: _Cut | None
    spans: _Cut | None

    @classmethod
    def make(cls, mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> _Plan:
        sizes = BlockSizes(query=min(sizes.query, num_queries), key=min(sizes.key, num_keys))
        return cls(
            mask=mask,
            num_keys=num_keys,
            sizes=sizes,
            segments=_Cut.make(mask.query_segments, mask.key_segments, sizes),
            spans=_Cut.make(mask.query_spans, mask.key_spans, sizes),
        )

    def seen(self, i: Array, j: Array) -> Array:
        """Whether queries of block i see keys of block j, bool [B or 1, 1, 1, block, block]."""
        q = i * self.sizes.query + jnp.arange(self.sizes.query)
        k = j * self.sizes.key + jnp.arange(self.sizes.key)
        seen = self.mask.allowed(
            self.mask.query_offset + q,
            k,
            segments=None if self.segments is None else self.segments.at(i, j),
            spans=None if self.spans is None else self.spans.at(i, j),
        )
        if self.num_keys % self.sizes.key:
            seen &= k < self.num_keys
        return seen[:, None, None]


class _Cut(NamedTuple):
    """Ids of queries [B, blocks, block] and of keys."""

    queries: Array
    keys: Array

    @classmethod
    def make(cls, queries: Array | None, keys: Array | None, sizes: BlockSizes) -> _Cut | None:
        if queries is None or keys is None:
            return None
        return cls(cut(queries, sizes.query, axis=1), cut(keys, sizes.key, axis=1))

    def at(self, i: Array, j: Array) -> Ids:
        """Of block i of the queries and block j of the keys, each [B, block]."""
        at = lax.dynamic_index_in_dim
        return Ids(at(self.queries, i, 1, keepdims=False), at(self.keys, j, 1, keepdims=False))


def _rows_differ(mask: AttentionMask, query: Array) -> bool:
    """Whether a block may be hidden in one row and not in another: then each row skips its own."""
    return query.shape[0] > 1 and (mask.query_segments is not None or mask.query_spans is not None)


def _row_by_row(one_row: Callable[..., tuple[Array, ...]], *arguments: Any) -> Any:
    """What a function of a batch gives, computed for a batch of each row in turn."""

    def row(arguments: Any) -> tuple[Array, ...]:
        found = one_row(*jax.tree.map(lambda x: x[None], arguments))
        return tuple(x[0] for x in found)

    return lax.map(row, arguments)


def _grouped(array: Array, num_kv_heads: int, block: int) -> Array:
    """[B, T, N, H] -> [B, K, blocks, G, block, H]."""
    B, T, N, H = array.shape
    array = array.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)
    return cut(array, block, axis=3).transpose(0, 1, 3, 2, 4, 5)


def _by_head(array: Array, block: int) -> Array:
    """[B, S, K, H] -> [B, K, blocks, block, H]."""
    return cut(array.transpose(0, 2, 1, 3), block, axis=2)


def _scores(q: Array, k: Array) -> Array:
    """Products of queries and keys of one block each, float32 [B, K, G, block, block]."""
    return exact("BKGTH,BKSH->BKGTS", q, k)


def _block(array: jax.Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(array, i, 2, keepdims=False)
