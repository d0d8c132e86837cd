"""Attention with all its scores in memory: the oracle, and the fastest where rows are short."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sealion_kernels.masks import AttentionMask
from sealion_kernels.precision import exact
from sealion_kernels.softmax import MASKED


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax(scale * q k^T) v over the keys that `mask` shows, and the scores' log-sum-exp (float32).

    Scores and softmax are float32. Query head n reads key-value head n // (N / K); keys are not repeated.
    Memory is quadratic in the length. A query that sees no key has zeros, and a log-sum-exp of -inf.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = exact("BTKGH,BSKH->BKGTS", grouped, key) * scale
    seen = mask.dense(T, S)[:, None, None]
    scores = jnp.where(seen, scores, MASKED)
    # Subtracting a constant changes nothing, so it has no gradient; `seen` zeroes rows that see no key.
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    log_sum = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]  # [B, K, G, T]
    mixed = exact("BKGTS,BSKH->BTKGH", (weights / total).astype(value.dtype), value)
    log_sum = log_sum.transpose(0, 3, 1, 2).reshape(B, T, N)
    return mixed.reshape(B, T, N, H).astype(query.dtype), log_sum
