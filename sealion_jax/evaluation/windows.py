"""Documents cut into pieces that fit the context, and packed into rows.

A document longer than the context is scored in strided windows. Each window begins with `<bos>`, goes on with
half a context of text that came before, and scores what follows:

    document  <bos> t1 t2 t3 t4 t5 t6 t7 t8 t9 <eos>          context 6
    window 1  <bos> t1 t2 t3 t4 t5                            scores t1 .. t6
    window 2              <bos> t4 t5 t6 t7 t8                scores t7 t8 t9
    window 3                       <bos> t7 t8 t9             scores <eos>

so that each token is scored once, with at least half a context before it unless its document begins there. Of
a conversation only the assistant's tokens are scored; windows that have none of them are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from sealion_jax.data.packing.best_fit import best_fit


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A window of one document: inputs, what follows each, and which of those targets are scored here."""

    document: int
    tokens: Int32[np.ndarray, " tokens"]
    targets: Int32[np.ndarray, " tokens"]
    num_context: int
    """So many of the first targets belong to the window before."""
    scored: Bool[np.ndarray, " targets"]
    """Which of the others are scored."""


def cut(
    document: int, tokens: Sequence[int] | np.ndarray, *, context: int, scored: np.ndarray | None = None
) -> Iterator[Piece]:
    """The windows of a document, each at most `context` long.

    Args:
        tokens: `<bos>` and all that follows.
        scored: which of the tokens are, bool; None for all but `<bos>`. What is behind the last one is left
            out.

    Raises:
        ValueError: the context has no room for a token.
    """
    if context < 1:
        raise ValueError(f"a context of {context} tokens has no room for one; it must be at least 1")
    ids = np.asarray(tokens, np.int32)
    scored = np.ones(len(ids), bool) if scored is None else scored
    last, start, seen = int(np.flatnonzero(scored).max(initial=0)), 0, 0
    while seen < last:
        stop = min(start + context, last)
        if scored[seen + 1 : stop + 1].any():
            yield Piece(
                document=document,
                tokens=np.concatenate([ids[:1], ids[start + 1 : stop]]),
                targets=ids[start + 1 : stop + 1],
                num_context=seen - start,
                scored=scored[seen + 1 : stop + 1],
            )
        seen, start = stop, stop - context // 2


def pack(pieces: Sequence[Piece], *, row_length: int) -> list[list[int]]:
    """Rows of pieces' numbers, each row at most `row_length` long: best fit, longest first."""
    packing = best_fit(np.array([len(piece.tokens) for piece in pieces], np.int64), capacity=row_length)
    return [packing.row(number).tolist() for number in range(len(packing))]


def to_arrays(
    pieces: Sequence[Piece], rows: Sequence[Sequence[int]], *, row_length: int
) -> dict[str, np.ndarray]:
    """A batch [len(rows), row_length] in the trainer's form; each piece is a segment of its own."""
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(rows), row_length), np.int32) for name in names}
    for b, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row, start=1):
            piece = pieces[number]
            span = slice(start, start + len(piece.tokens))
            batch["tokens"][b, span] = piece.tokens
            batch["targets"][b, span] = piece.targets
            batch["segment_ids"][b, span] = segment
            batch["positions"][b, span] = np.arange(len(piece.tokens))
            start = span.stop
    return batch
