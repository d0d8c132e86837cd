"""The legend of dimension letters: the same in annotations, einsums and comments everywhere.

    B  batch (rows)          T  query tokens         S  key tokens
    D  model dim             N  query heads          K  key-value heads
    G  query heads per key-value head (N / K)        H  head dim
    F  feed-forward dim      V  vocabulary           L  layers
    P  image patches         R  preference pairs in a row
    W  width (rank) of a low-rank adapter

A lower-case letter is a part of that dimension: t of T tokens, s of S.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

TokenIds = Int[Array, "B T"]
"""Token ids, positions or segment ids of packed rows."""

Hidden = Float[Array, "B T D"]
"""Activations between layers."""

LogProbs = Float[Array, "B T"]
"""One float32 log-probability a token."""
