"""What a packed row is, and what everything that makes rows of a token store offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sealion_jax.data.store.token_store import TokenStore

BOS_ID = 2
PAD_ID = 0

Row = dict[str, Any]
"""One row: tokens, targets, segment_ids, positions int32 [T], loss_mask float32 [T]; pairs have more."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a row that is one document's: one segment."""

    document: int
    """Its index in the store."""
    language: str
    start: int
    """Tokens [start, stop) of the document; its own <bos> is token 0, an inserted <bos> is none of them."""
    stop: int
    document_tokens: int
    segment: int
    row_start: int
    """Positions [row_start, row_stop) of the row, an inserted <bos> included."""
    row_stop: int


class PackedStore(Protocol):
    """The rows of a token store: random access, and threads may share it."""

    @property
    def store(self) -> TokenStore: ...

    @property
    def unique_tokens(self) -> int:
        """What a multiplier multiplies: the tokens of text that are read in the time of one pass."""
        ...

    def __len__(self) -> int: ...

    def row(self, window: int) -> Row:
        """Tokens, targets and masks of a row."""
        ...

    def spans(self, window: int) -> tuple[Span, ...]:
        """The documents in a row, in order, from index arrays alone: no token is read."""
        ...
