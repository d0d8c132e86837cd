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

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

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
    """The documents of a JSONL file of `{"text", "lang", "id"}` rows; `lang` and `id` may be missing.

    Raises:
        UserError: no such file, a row that is not JSON or has no text; names the line.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"no evaluation file {path}; give a JSONL file with a `text` in each row")
    documents: list[Document] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(documents) >= limit:
                break
            try:
                row = json.loads(line)
                text = row["text"]
                num_bytes = len(text.encode())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}:{number}: not a JSON object with a `text` string ({error})"
                ) from error
            if text.strip():
                documents.append(
                    Document(
                        text=text,
                        language=str(row.get("lang", "unknown")),
                        id=str(row.get("id", number)),
                        num_bytes=num_bytes,
                    )
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
    """
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
    """Rows of pieces' numbers, each row at most `row_length` long: first fit, longest first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(pieces)), key=lambda n: -len(pieces[n].tokens)):
        length = len(pieces[number].tokens)
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([])
            room.append(row_length)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= length
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
