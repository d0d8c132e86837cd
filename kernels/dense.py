"""Attention with all its scores in memory: the oracle, and the fastest where rows are short."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sealion_kernels.masks import AttentionMask

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys that `mask` shows, in the query's dtype.

    Scores and softmax are float32. Query head n reads key-value head n // (N / K); keys are not repeated.
    Memory is quadratic in the length.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32) * scale
    seen = mask.dense(T, S)[:, None, None]
    scores = jnp.where(seen, scores, MASKED)
    # Subtracting a constant changes nothing, so it has no gradient; `seen` zeroes rows that see no key.
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    mixed = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return mixed.reshape(B, T, N, H).astype(query.dtype)
