"""Which keys a query sees: one description that every implementation of attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class Distances(NamedTuple):
    """From keys to queries, in places, over all pairs of some of each; below 0 the key comes after."""

    least: Any
    most: Any


class Ids(NamedTuple):
    """Segments or spans, of queries and of keys; arrays, their block specs, or references in a kernel."""

    queries: Any
    keys: Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_segments", "key_segments", "query_spans", "key_spans"),
    meta_fields=("causal", "window", "query_offset"),
)
@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Causal, within a window, within a segment: a key is seen where all that are set agree.

    Spans (images) lift causality, and nothing else: tokens of one span see each other in both directions, as
    far as the window and the segment reach. That is Transformers' mask for Gemma 3's images.

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

        causal,              causal, window 2,
        spans 0 1 1 1 0      spans 0 1 1 1 0
        x . . . .            x . . . .
        x x x x .            x x x . .
        x x x x .            . x x x .
        x x x x .            . . x x .
        x x x x x            . . . x x

    A query that sees no key at all gets zeros.
    """

    causal: bool = True
    window: int | None = None
    """Keys seen on one side, the query's own index included: |q - k| < window; where causality holds that is
    0 <= q - k < window."""
    query_offset: int = 0
    """Index of the first query among the keys, for queries that continue a longer row of keys."""
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    query_spans: Int[Array, "B T"] | None = None
    """0 outside any span, else the number of the span."""
    key_spans: Int[Array, "B S"] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not isinstance(self.window, int | np.integer):
            raise ValueError(f"window must be a whole number of keys, not {self.window!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the query itself), not {self.window}")
        for name in ("segments", "spans"):
            if (getattr(self, f"query_{name}") is None) != (getattr(self, f"key_{name}") is None):
                raise ValueError(f"query_{name} and key_{name} come together: give both or neither")

    @property
    def has_spans(self) -> bool:
        """Whether spans lift causality anywhere; without causality they have nothing to lift."""
        return self.causal and self.query_spans is not None

    @property
    def keys_back(self) -> int | None:
        """How far before a query its first key can be; None without a limit."""
        return None if self.window is None else self.window - 1

    @property
    def keys_ahead(self) -> int | None:
        """How far after a query its last key can be; None without a limit."""
        return self._ahead(spans=self.has_spans)

    def _ahead(self, *, spans: bool) -> int | None:
        return 0 if self.causal and not spans else self.keys_back

    @property
    def numbers(self) -> AttentionMask:
        """Without the arrays: what is known when a call is traced."""
        return AttentionMask(causal=self.causal, window=self.window, query_offset=self.query_offset)

    def conditions(
        self, distance: Int[Array, ...], *, segments: Ids | None, spans: Ids | None
    ) -> list[Bool[Array, ...]]:
        """What has to hold, all of it, for a query to see a key; none: every query sees every key.

        Args:
            distance: from the key to the query, in places.
            segments: of those queries and keys, in shapes that broadcast; the mask's own arrays are not read.
            spans: likewise.
        """
        every = []
        if self.causal:
            seen = distance >= 0
            if spans is not None:
                seen |= (spans.queries == spans.keys) & (spans.queries > 0)
            every.append(seen)
        if self.window is not None:
            one_sided = self.causal and spans is None
            every.append((distance if one_sided else jnp.abs(distance)) < self.window)
        if segments is not None:
            every.append(segments.queries == segments.keys)
        return every

    def distances(self, first_query: Any, first_key: Any, num_queries: Any, num_keys: Any) -> Distances:
        """Of runs of queries and of keys: numbers, arrays of any shapes that broadcast, or traced values.

        Args:
            first_query: index among the queries, `query_offset` not added.
        """
        back = self.query_offset + first_query - first_key
        return Distances(back - (num_keys - 1), back + (num_queries - 1))

    def some_within(self, distances: Distances, *, spans: bool) -> list[Any]:
        """What has to hold, all of it, for any of some queries to be within reach of any of some keys.

        Args:
            spans: whether there are any, which may lift causality; the mask's own arrays are not read.
        """
        ahead, every = self._ahead(spans=spans), []
        if self.keys_back is not None:
            every.append(distances.least <= self.keys_back)
        if ahead is not None:
            every.append(distances.most >= -ahead)
        return every

    def all_within(self, distances: Distances) -> list[Any]:
        """What has to hold, all of it, for each of some queries to be within reach of each of some keys."""
        every = []
        if self.causal:
            every.append(distances.least >= 0)
        if self.window is not None:
            every.append(distances.most < self.window)
            if not self.causal:
                every.append(distances.least > -self.window)
        return every

    def allowed(
        self,
        query_index: Int[Array, " t"],
        key_index: Int[Array, " s"],
        *,
        segments: Ids | None,
        spans: Ids | None,
    ) -> Bool[Array, "#B t s"]:
        """Whether each of some queries sees each of some keys.

        Args:
            query_index: indices among the keys, `query_offset` already added.
            key_index: indices of the keys.
            segments: of those queries and of those keys, [B, t] and [B, s].
            spans: likewise.
        """
        distance = (query_index[:, None] - key_index[None, :])[None]
        every = self.conditions(distance, segments=_across(segments), spans=_across(spans))
        return reduce(jnp.logical_and, every, jnp.ones(distance.shape, bool))

    def dense(self, num_queries: int, num_keys: int) -> Bool[Array, "#B T S"]:
        """Whether each query sees each key: the whole mask, quadratic in the length."""
        return self.allowed(
            self.query_offset + jnp.arange(num_queries),
            jnp.arange(num_keys),
            segments=_both(self.query_segments, self.key_segments),
            spans=_both(self.query_spans, self.key_spans),
        )


def _both(query: jax.Array | None, key: jax.Array | None) -> Ids | None:
    return None if query is None or key is None else Ids(query, key)


def _across(ids: Ids | None) -> Ids | None:
    return None if ids is None else Ids(ids.queries[:, :, None], ids.keys[:, None, :])
