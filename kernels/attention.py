"""The one entrance to attention: checks what is asked and picks who computes it."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float

from sealion_kernels.blockwise import blockwise_attention
from sealion_kernels.dense import dense_attention
from sealion_kernels.masks import AttentionMask

Implementation = Literal["auto", "dense", "blockwise"]

# Scores of one head that are no dearer to keep than to compute again block by block. (On a CPU, blocks win by
# a factor of two at rows of 512, of ten at 4096.)
DENSE_UP_TO_SCORES = 256 * 256


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys that `mask` shows, in the query's dtype.

    Scores and softmax are float32. Query head n reads key-value head n // (N / K); keys are not repeated.

    Args:
        implementation: "dense" keeps all scores; "blockwise" keeps memory linear in the length and skips what
            a window or causality hides; "auto" picks.

    Raises:
        ValueError: shapes that do not fit each other, or a combination that the implementation cannot do.
    """
    _check(query, key, value, mask)
    if implementation == "auto":
        short = query.shape[1] * key.shape[1] <= DENSE_UP_TO_SCORES
        implementation = "dense" if short else "blockwise"
    if implementation == "dense":
        return dense_attention(query, key, value, mask=mask, scale=scale)
    if implementation == "blockwise":
        return blockwise_attention(query, key, value, mask=mask, scale=scale)
    raise ValueError(f"implementation must be auto, dense or blockwise, not {implementation!r}")


def _check(query: Array, key: Array, value: Array, mask: AttentionMask) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"expected query [B, T, N, H] and key, value [B, S, K, H], got query {query.shape}, "
            f"key {key.shape}, value {value.shape}"
        )
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != H:
        raise ValueError(f"query {query.shape} and key {key.shape} differ in batch or head dim")
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key-value heads: use a multiple of {K}")
    if mask.query_segments is not None and mask.key_segments is not None:
        shapes = mask.query_segments.shape, mask.key_segments.shape
        if shapes != ((B, T), (B, S)):
            raise ValueError(f"query and key segments have shapes {shapes}, expected {((B, T), (B, S))}")
