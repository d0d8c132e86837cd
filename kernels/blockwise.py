"""Attention block by block in plain XLA: memory linear in the length, hidden blocks never computed.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2; grouped query heads ride along in the
rows of a block, so keys are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sealion_kernels.masks import AttentionMask

ATTENTION_RESIDUALS = ("attention_out", "attention_log_sum")
"""Names, for a rematerialisation policy, of what the backward pass needs besides queries, keys and values."""

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How T queries and S keys are cut into blocks, and which blocks a mask lets meet; all of it static."""

    scale: float
    mask: AttentionMask
    """Without segments: those are arrays, and travel beside."""
    num_queries: int
    num_keys: int
    query_block: int
    key_block: int

    @property
    def query_blocks(self) -> int:
        return -(-self.num_queries // self.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.num_keys // self.key_block)

    def keys_of(self, i: Array) -> tuple[Array, Array]:
        """First and one past the last key block that any query of block i can see."""
        first = self.mask.query_offset + i * self.query_block
        return self._meets(first, first + self.query_block - 1, self.key_block, self.key_blocks, past=True)

    def queries_of(self, j: Array) -> tuple[Array, Array]:
        """First and one past the last query block that can see any key of block j."""
        first = j * self.key_block - self.mask.query_offset
        return self._meets(first, first + self.key_block - 1, self.query_block, self.query_blocks, past=False)

    def _meets(self, first: Array, last: Array, size: int, count: int, *, past: bool) -> tuple[Array, Array]:
        back = None if self.mask.window is None else self.mask.window - 1
        ahead = 0 if self.mask.causal else back
        if not past:
            back, ahead = ahead, back
        start = jnp.zeros_like(first) if back is None else jnp.clip((first - back) // size, 0, count)
        stop = (
            jnp.full_like(first, count) if ahead is None else jnp.clip((last + ahead) // size + 1, 0, count)
        )
        return start, stop

    def seen(self, i: Array, j: Array, segments: tuple[Array, Array] | None) -> Array:
        """Whether queries of block i see keys of block j, bool [B or 1, 1, 1, block, block]."""
        q = i * self.query_block + jnp.arange(self.query_block)
        k = j * self.key_block + jnp.arange(self.key_block)
        query_segments = key_segments = None
        if segments is not None:
            query_segments = lax.dynamic_index_in_dim(segments[0], i, 1, keepdims=False)
            key_segments = lax.dynamic_index_in_dim(segments[1], j, 1, keepdims=False)
        seen = self.mask.allowed(self.mask.query_offset + q, k, query_segments, key_segments)
        if self.num_keys % self.key_block:
            seen &= k < self.num_keys
        return seen[:, None, None]


def blockwise_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
    block_size: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys that `mask` shows, in the query's dtype.

    Scores and softmax are float32. Only blocks that causality and the window let meet are computed, so a
    local layer costs length x window. Memory is linear in the length, in the backward pass too. Any length.

    Args:
        block_size: queries and keys a block; None picks.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    size = block_size or _block_size(max(T, S), mask.window)
    plan = _Plan(
        scale=scale,
        mask=replace(mask, query_segments=None, key_segments=None),
        num_queries=T,
        num_keys=S,
        query_block=min(size, T),
        key_block=min(size, S),
    )
    segments = None
    if mask.query_segments is not None and mask.key_segments is not None:
        segments = (
            _cut(mask.query_segments, plan.query_block, axis=1),
            _cut(mask.key_segments, plan.key_block, axis=1),
        )
    # [B, T, N, H] -> [B, K, blocks, G, block, H] and [B, S, K, H] -> [B, K, blocks, block, H]
    q = _cut(query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), plan.query_block, axis=3)
    q = q.transpose(0, 1, 3, 2, 4, 5)
    k = _cut(key.transpose(0, 2, 1, 3), plan.key_block, axis=2)
    v = _cut(value.transpose(0, 2, 1, 3), plan.key_block, axis=2)
    out: Array = _attend(q, k, v, segments, plan)
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, N, H)
    return out[:, :T]


def _block_size(length: int, window: int | None) -> int:
    """Small where rows are short, for a CPU's cache; larger where they are long, for fewer loop turns."""
    size = 128 if length <= 2048 else 256 if length <= 4096 else 512
    return size if window is None else min(size, max(128, window // 2))


def _cut(array: Array, block: int, *, axis: int) -> Array:
    """`array` with `axis` split into (blocks, block), zero-padded at its end."""
    length = array.shape[axis]
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, -length % block)
    array = jnp.pad(array, pad) if length % block else array
    return array.reshape(*array.shape[:axis], -1, block, *array.shape[axis + 1 :])


def _scores(q: Array, k: Array) -> Array:
    """Products of queries and keys of one block each, float32 [B, K, G, block, block]."""
    return jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)


def _block(array: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(array, i, 2, keepdims=False)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, plan: _Plan):
    return _forward(q, k, v, segments, plan)[0]


def _forward(q, k, v, segments, plan: _Plan):
    """Mixed values [B, K, blocks, G, block, H] and log-sum-exp of the scores [B, K, blocks, G, block]."""

    def query_block(_, i):
        q_i = _block(q, i)

        def key_block(j, carry):
            top, total, mixed = carry
            seen = plan.seen(i, j, segments)
            scores = jnp.where(seen, _scores(q_i, _block(k, j)) * plan.scale, MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            fade = jnp.exp(top - new_top)
            v_j = _block(v, j)
            mixed = mixed * fade[..., None] + jnp.einsum(
                "BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v_j, preferred_element_type=jnp.float32
            )
            return new_top, total * fade + weights.sum(-1), mixed

        # Made from q_i, so that under `shard_map` they vary over the devices as what is added to them does.
        zeros = jnp.zeros_like(q_i, jnp.float32)
        start = (zeros[..., 0] + MASKED, zeros[..., 0], zeros)
        top, total, mixed = lax.fori_loop(*plan.keys_of(i), key_block, start)
        safe = jnp.where(total == 0, 1.0, total)
        return None, ((mixed / safe[..., None]).astype(q.dtype), top + jnp.log(safe))

    _, (out, log_sum) = lax.scan(query_block, None, jnp.arange(plan.query_blocks))
    return jnp.moveaxis(out, 0, 2), jnp.moveaxis(log_sum, 0, 2)


def _forward_rule(q, k, v, segments, plan: _Plan):
    out, log_sum = _forward(q, k, v, segments, plan)
    out, log_sum = map(checkpoint_name, (out, log_sum), ATTENTION_RESIDUALS)
    return out, (q, k, v, segments, out, log_sum)


def _backward_rule(plan: _Plan, saved, d_out):
    q, k, v, segments, out, log_sum = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)

    def key_block(dq, j):
        k_j, v_j = _block(k, j), _block(v, j)

        def query_block(i, carry):
            dq, dk_j, dv_j = carry
            q_i, d_out_i = _block(q, i), _block(d_out, i)
            scores = _scores(q_i, k_j) * plan.scale
            weights = jnp.where(
                plan.seen(i, j, segments), jnp.exp(scores - _block(log_sum, i)[..., None]), 0.0
            )
            d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", d_out_i, v_j, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - _block(delta, i)[..., None]) * plan.scale
            weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
            dv_j += jnp.einsum("BKGTS,BKGTH->BKSH", weights, d_out_i, preferred_element_type=jnp.float32)
            dk_j += jnp.einsum("BKGTS,BKGTH->BKSH", d_scores, q_i, preferred_element_type=jnp.float32)
            dq_i = jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k_j, preferred_element_type=jnp.float32)
            dq = lax.dynamic_update_index_in_dim(dq, _block(dq, i) + dq_i, i, 2)
            return dq, dk_j, dv_j

        zeros = jnp.zeros_like(k_j, jnp.float32)
        dq, dk_j, dv_j = lax.fori_loop(*plan.queries_of(j), query_block, (dq, zeros, zeros))
        return dq, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros_like(q, jnp.float32), jnp.arange(plan.key_blocks))
    return dq.astype(q.dtype), jnp.moveaxis(dk, 0, 2), jnp.moveaxis(dv, 0, 2), None


_attend.defvjp(_forward_rule, _backward_rule)
