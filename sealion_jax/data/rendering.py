"""Rows of a batch as text that a person can check: documents, sources, segments, and what is learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sealion_jax.data.batches import GlobalBatches, RowOrigin
from sealion_jax.data.packing.rows import Row, Span
from sealion_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What is put around parts of the text."""

    context: tuple[str, str]
    """Around tokens that the row does not learn to predict."""
    control: tuple[str, str]
    """Around control tokens, so that text that spells one is told from it."""
    heading: tuple[str, str]


PLAIN = Marks(context=("⟦", "⟧"), control=("", ""), heading=("", ""))
TERMINAL = Marks(
    context=("\x1b[2m", "\x1b[22m"), control=("\x1b[7m", "\x1b[27m"), heading=("\x1b[1m", "\x1b[22m")
)


def render_step(
    batches: GlobalBatches,
    tokenizer: Tokenizer,
    step: int,
    *,
    rows: Sequence[int] | None = None,
    marks: Marks = PLAIN,
    most_tokens: int | None = None,
) -> Iterator[str]:
    """Lines that show a step's rows, one row after the other.

    Args:
        rows: all of them where None.
        most_tokens: of each document only so many, from both ends of its part; all of it where None.
    """
    size = batches.global_batch_size
    rows = range(size) if rows is None else rows
    opening, closing = marks.context
    yield f"step {step}: batch {batches.batch_number(step)}, {size} rows"
    yield f"{opening}like this{closing}: context only, not predicted in this row"
    for row in rows:
        batch = batches.rows(step, [row])
        values = {name: array[0] for name, array in batch.items()}
        origin = batches.documents(step, row)
        yield ""
        yield "".join((marks.heading[0], _row_heading(row, values, origin), marks.heading[1]))
        for span in origin.spans:
            yield f"  {_span_heading(span, batches, values)}"
            text = _span_text(values, span, tokenizer, marks, most_tokens)
            yield from (f"    {line}" for line in text.split("\n"))
        beyond = _predicted_beyond(values)
        is_text = batches.mixture.sources[int(values["source"])].store.kind == "text"
        if beyond is not None and is_text:
            spelled = tokenizer.pieces([beyond])[0].translate(_ESCAPES).replace("\n", "\\n")
            yield f"  the last token predicts '{spelled}', with which the source's next window begins"


def _row_heading(row: int, values: Row, origin: RowOrigin) -> str:
    used = int(np.sum(values["segment_ids"] > 0))
    length = len(values["tokens"])
    return (
        f"row {row}: {origin.source} (epoch {origin.epoch}, window {origin.window} of {origin.windows}), "
        f"{used} tokens, {length - used} padding, {int(np.sum(values['loss_mask'] > 0))} in the loss"
    )


def _span_heading(span: Span, batches: GlobalBatches, values: Row) -> str:
    store = batches.mixture.sources[int(values["source"])].store
    file, line = store.origin(span.document)
    if span.stop - span.start == span.document_tokens:
        part = "whole"
    elif span.stop - span.start == 1:
        part = f"token {span.start} of {span.document_tokens}"
    else:
        part = f"tokens {span.start} to {span.stop - 1} of {span.document_tokens}"
    side = ("chosen, ", "rejected, ")[span.document % 2] if store.kind == "pairs" else ""
    return (
        f"segment {span.segment}: {span.language}, document {span.document} ({file}, row {line}), "
        f"{side}{part}, positions {span.row_start} to {span.row_stop - 1}"
    )


@dataclass(frozen=True)
class _Piece:
    text: str
    learned: bool
    control: bool


def _pieces(values: Row, first: int, last: int, tokenizer: Tokenizer) -> list[_Piece]:
    """The text of positions [first, last) in runs of tokens that are learned or not, control tokens alone.

    A token is learned if the position before it predicts it.
    """
    learned = np.concatenate(([False], values["loss_mask"][:-1] > 0))[first:last].tolist()
    ids = values["tokens"][first:last].tolist()
    kinds = [(flag, token in tokenizer.control_ids) for flag, token in zip(learned, ids, strict=True)]
    pieces = []
    for (flag, control), run in itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        run_ids = [token for _, token in run]
        texts = tokenizer.pieces(run_ids) if control else [tokenizer.decode(run_ids)]
        pieces += [_Piece(text.translate(_ESCAPES), flag, control) for text in texts]
    return pieces


def _span_text(values: Row, span: Span, tokenizer: Tokenizer, marks: Marks, most: int | None) -> str:
    first, last = span.row_start, span.row_stop
    if most is None or last - first <= most:
        return _marked(_pieces(values, first, last, tokenizer), marks)
    head, tail = first + most - most // 4, last - most // 4
    begin, end = _pieces(values, first, head, tokenizer), _pieces(values, tail, last, tokenizer)
    return f"{_marked(begin, marks)} [{tail - head} tokens] {_marked(end, marks)}"


# What would move a cursor, ring, or turn the reading direction around; tabs and newlines stay.
_ESCAPES = {
    code: ascii(chr(code))[1:-1]
    for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def _marked(pieces: Sequence[_Piece], marks: Marks) -> str:
    parts = []
    for learned, run in itertools.groupby(pieces, key=lambda piece: piece.learned):
        text = "".join(
            "".join((marks.control[0], piece.text, marks.control[1])) if piece.control else piece.text
            for piece in run
        )
        parts.append(text if learned else "".join((marks.context[0], text, marks.context[1])))
    return "".join(parts)


def _predicted_beyond(values: Row) -> int | None:
    """The target of the row's last token, where it is learned: it is no token of this row."""
    used = int(np.sum(values["segment_ids"] > 0))
    return int(values["targets"][used - 1]) if values["loss_mask"][used - 1] else None
