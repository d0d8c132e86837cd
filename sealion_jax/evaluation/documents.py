"""Documents to be scored, cut into pieces that fit the context and packed into rows.

A document longer than the context is scored in strided windows. Each window begins with `<bos>`, goes on with
half a context of text that was scored before, and scores what follows:

    document  <bos> t1 t2 t3 t4 t5 t6 t7 t8 t9 <eos>          context 6
    window 1  <bos> t1 t2 t3 t4 t5                            scores t1 .. t6
    window 2              <bos> t4 t5 t6 t7 t8                scores t7 t8 t9
    window 3                       <bos> t7 t8 t9             scores <eos>

so that each token is scored once, with at least half a context before it unless its document begins there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sealion_jax.data import files
from sealion_jax.data.inputs.rows import FieldNames, Skipped
from sealion_jax.data.inputs.text_files import Position, read_lines
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Document:
    """A held-out text."""

    text: str
    language: str
    id: str
    num_bytes: int
    """UTF-8 bytes of the raw text."""


def read_documents(path: str, *, limit: int | None = None) -> list[Document]:
    """The documents of a JSONL file of `{"text", "lang", "id"}` rows, read as `prepare` reads them.

    The file may be .gz or .zst. A row without `lang` is of the language `und`; one without `id` is called by
    its line's number. Blank texts are left out.

    Raises:
        UserError: no such file, or one that is cut short; a row that is not JSON or has no text, whose line
            is named; no documents.
    """
    if not files.exists(path):
        raise UserError(f"no evaluation file {path}; give a JSONL file with a `text` in each row")
    chunks = read_lines(path, plain=False, start=Position())
    documents: list[Document] = []
    for row in (row for chunk in chunks for row in chunk.rows(FieldNames())):
        if limit is not None and len(documents) >= limit:
            break
        if not isinstance(row, Skipped):
            documents.append(
                Document(
                    text=row.text,
                    language=row.language,
                    id=str(row.line) if row.id is None else row.id,
                    num_bytes=len(row.text.encode()),
                )
            )
        elif row.reason != "empty":
            raise UserError(
                f"{path}:{row.line}: not a JSON object with a `text` string ({row.reason}: {row.detail})"
            )
    if not documents:
        raise UserError(f"{path} holds no documents to evaluate on")
    return documents


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A window of one document: inputs, what follows each, and how many of the first are context only."""

    document: int
    tokens: np.ndarray
    targets: np.ndarray
    num_context: int


def cut(document: int, tokens: Sequence[int], *, context: int) -> Iterator[Piece]:
    """The windows of a document, each at most `context` long.

    Args:
        tokens: `<bos> text <eos>`.

    Raises:
        ValueError: the context has no room for a token.
    """
    if context < 1:
        raise ValueError(f"a context of {context} tokens has no room for one; it must be at least 1")
    ids = np.asarray(tokens, np.int32)
    last, start, scored = len(ids) - 1, 0, 0
    while scored < last:
        stop = min(start + context, last)
        yield Piece(
            document=document,
            tokens=np.concatenate([ids[:1], ids[start + 1 : stop]]),
            targets=ids[start + 1 : stop + 1],
            num_context=scored - start,
        )
        scored, start = stop, stop - context // 2


def pack(pieces: Sequence[Piece], *, row_length: int) -> list[list[int]]:
    """Rows of pieces' numbers, each row at most `row_length` long: best fit, longest first.

    A piece goes to the row with the least room that is enough. Rows are kept by their room, of which there
    are at most `row_length`, so the work is that of sorting the pieces.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # those in by_room, in order
    for number in sorted(range(len(pieces)), key=lambda n: -len(pieces[n].tokens)):
        length = len(pieces[number].tokens)
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, row = row_length, []
            rows.append(row)
        row.append(number)
        if room - length not in by_room:
            by_room[room - length] = []
            bisect.insort(rooms, room - length)
        by_room[room - length].append(row)
    return rows


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


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """`<bos> text <eos>` of each document."""
    texts = tokenizer.encode_batch([document.text for document in documents])
    return [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in texts]
