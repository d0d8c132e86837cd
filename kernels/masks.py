"""Which keys a query sees: one description that every implementation of attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_segments", "key_segments"),
    meta_fields=("causal", "window", "query_offset"),
)
@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Causal, within a window, within a segment: a key is seen where all that are set agree.

    Distances are between row indices: query t stands at index `query_offset + t`, key s at index s. Packed
    segments are contiguous, so inside one of them this equals the distance between positions.

    Rows are queries, columns are keys, x is seen:

        causal          causal, window 3     causal, segments 1 1 1 2 2
        x . . . .       x . . . .            x . . . .
        x x . . .       x x . . .            x x . . .
        x x x . .       x x x . .            x x x . .
        x x x x .       . x x x .            . . . x .
        x x x x x       . . x x x            . . . x x

        window 2,       causal,
        not causal      query_offset 3 (two queries, five keys)
        x x . . .       x x x x .
        x x x . .       x x x x x
        . x x x .
        . . x x x
        . . . x x

    A query that sees no key at all gets zeros.
    """

    causal: bool = True
    window: int | None = None
    """Keys seen on one side, the query's own index included: 0 <= q - k < window, or |q - k| < window."""
    query_offset: int = 0
    """Index of the first query among the keys, for queries that continue a longer row of keys."""
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the query itself), not {self.window}")
        if (self.query_segments is None) != (self.key_segments is None):
            raise ValueError("query_segments and key_segments come together: give both or neither")

    def allowed(
        self,
        query_index: Int[Array, " t"],
        key_index: Int[Array, " s"],
        query_segments: Int[Array, "B t"] | None,
        key_segments: Int[Array, "B s"] | None,
    ) -> Bool[Array, "#B t s"]:
        """Whether each of some queries sees each of some keys.

        Args:
            query_index: indices among the keys, `query_offset` already added.
            key_index: indices of the keys.
            query_segments: segment ids of those queries, or None.
            key_segments: segment ids of those keys, or None.
        """
        distance = query_index[:, None] - key_index[None, :]
        seen = jnp.ones(distance.shape, bool)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= jnp.abs(distance) < self.window
        if query_segments is None or key_segments is None:
            return seen[None]
        return seen[None] & (query_segments[:, :, None] == key_segments[:, None, :])

    def dense(self, num_queries: int, num_keys: int) -> Bool[Array, "#B T S"]:
        """Whether each query sees each key: the whole mask, quadratic in the length."""
        return self.allowed(
            self.query_offset + jnp.arange(num_queries),
            jnp.arange(num_keys),
            self.query_segments,
            self.key_segments,
        )
