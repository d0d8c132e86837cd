"""Held-out files, each of one kind, read and turned into documents: tokens, and which of them are scored.

    text     {"text": ...}                                      <bos> text <eos>; all of it is scored
    chats    {"messages": [...]}                                scored is what the assistant says
             {"prompt": ..., "completion": ...}                 scored is the completion
    pairs    {"prompt": ..., "chosen": ..., "rejected": ...}    two documents each, the chosen one first;
                                                                scored are the answers

Rows are read as `prepare` reads them, and rendered as it renders them. But held-out files are small and have
to be right: where `prepare` skips a row, this is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from sealion_jax.data import files
from sealion_jax.data.chat.conversation import Conversation
from sealion_jax.data.chat.format import learned_bytes
from sealion_jax.data.chat.rendering import loss_mask, render_chats
from sealion_jax.data.inputs.chats import chat_example, pair_example
from sealion_jax.data.inputs.chunks import Position
from sealion_jax.data.inputs.rows import FieldNames, Record, Skipped, document_from_fields
from sealion_jax.data.inputs.text_files import read_lines
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Document:
    """Tokens, and which of them are scored, whatever they were made of."""

    tokens: Int32[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]
    language: str
    id: str
    num_bytes: int
    """UTF-8 bytes of the text that is scored."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A held-out text."""

    text: str
    language: str
    id: str
    num_bytes: int
    """UTF-8 bytes of the raw text."""


def read_held_out(
    path: str, tokenizer: Tokenizer, *, limit: int | None = None
) -> tuple[StoreKind, list[Document]]:
    """The kind of a JSONL file, told by its first row, and its documents; of a pair two, one after the other.

    Args:
        limit: at most so many texts, chats or pairs from the file's start.

    Raises:
        UserError: no such file, or one that is cut short; a row that cannot be used, or of another kind than
            the first, whose line is named; no documents; chats, and a tokenizer without Gemma 3's layout.
    """
    kind = _find_kind(path)
    if kind == "text":
        return kind, _encode_texts(read_documents(path, limit=limit), tokenizer)
    if kind == "chats":
        chats = _read_rows(path, kind, chat_example, limit=limit)
        return kind, _encode_chats([(x.content, x.language, _name(x.id, x.line)) for x in chats], tokenizer)
    pairs = _read_rows(path, kind, pair_example, limit=limit)
    sides = [
        (side, x.language, _name(x.id, x.line))
        for x in pairs
        for side in (x.content.chosen, x.content.rejected)
    ]
    return kind, _encode_chats(sides, tokenizer)


def read_documents(path: str, *, limit: int | None = None) -> list[Text]:
    """The texts of a JSONL file of `{"text", "lang", "id"}` rows, read as `prepare` reads them.

    The file may be .gz or .zst. A row without `lang` is of the language `und`; one without `id` is called by
    its line's number. Blank texts are left out.

    Raises:
        UserError: no such file, or one that is cut short; a row that is not JSON or has no text, whose line
            is named; no documents.
    """
    rows = _read_rows(path, "text", document_from_fields, limit=limit)
    if not rows:
        raise UserError(f"{path} holds no documents to evaluate on")
    return [
        Text(
            text=row.text,
            language=row.language,
            id=_name(row.id, row.line),
            num_bytes=len(row.text.encode()),
        )
        for row in rows
    ]


class _UnusableError(ValueError):
    """Why a row cannot be used."""


_EXPECTED: dict[StoreKind, str] = {
    "text": "a JSON object with a `text` string",
    "chats": "a chat that can be used",
    "pairs": "a pair that can be used",
}


def _read_rows(
    path: str, kind: StoreKind, parse: Callable[..., Row | Skipped], *, limit: int | None
) -> list[Row]:
    """The rows of a file of this kind; UserError for one that cannot be used."""
    rows: list[Row] = []
    for record in _records(path):
        if limit is not None and len(rows) >= limit:
            break
        try:
            rows += _parsed(record, kind, parse)
        except _UnusableError as error:
            raise UserError(
                f"{path}:{record.line}: not {_EXPECTED[kind]} ({error}); correct or remove it"
            ) from None
    return rows


def _parsed(record: Record | Skipped, kind: StoreKind, parse: Callable[..., Row | Skipped]) -> list[Row]:
    """The row of a record, or none for a blank text; raises _UnusableError."""
    if isinstance(record, Record):
        if (found := _kind_of(record.fields)) not in (kind, None):
            raise _UnusableError(f"it is one of {found}, and a file's rows are all of one kind")
        row = parse(record.fields, FieldNames(), line=record.line)
        if not isinstance(row, Skipped):
            return [row]
        if row.reason == "empty":
            return []
        record = row
    raise _UnusableError(f"{record.reason}: {record.detail}")


def _find_kind(path: str) -> StoreKind:
    """The kind of the first row; a file without one is left to the reader of texts."""
    for record in _records(path):
        if isinstance(record, Skipped):
            reason = f"{record.reason}: {record.detail}"
            raise UserError(f"{path}:{record.line}: not a JSON object ({reason}); correct or remove it")
        kind = _kind_of(record.fields)
        if kind is None:
            raise UserError(
                f"{path}:{record.line}: nothing in this row is evaluated; expected text, or messages, or "
                "prompt and completion, or prompt, chosen and rejected"
            )
        return kind
    return "text"


def _kind_of(fields: Mapping[str, object]) -> StoreKind | None:
    """What a row is by the fields that it has; data sets of pairs often have `messages` too."""
    there = {name for name, value in fields.items() if value is not None}
    if "text" in there:
        return "text"
    if there & {"chosen", "rejected"}:
        return "pairs"
    return "chats" if there & {"messages", "prompt", "completion"} else None


def _records(path: str) -> Iterator[Record | Skipped]:
    """The JSON objects of a file's lines; blank lines only separate."""
    if not files.exists(path):
        raise UserError(
            f"no evaluation file {path}; give a JSONL file with a text, a chat or a pair in each row"
        )
    for chunk in read_lines(path, plain=False, start=Position()):
        yield from chunk.records(FieldNames())


def _name(name: str | None, line: int) -> str:
    return str(line) if name is None else name


def _encode_texts(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Document]:
    """`<bos> text <eos>` of each text."""
    encoded = tokenizer.encode_batch([text.text for text in texts])
    tokens = [np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32) for ids in encoded]
    return [
        Document(
            tokens=ids,
            scored=np.arange(len(ids)) > 0,
            language=text.language,
            id=text.id,
            num_bytes=text.num_bytes,
        )
        for text, ids in zip(texts, tokens, strict=True)
    ]


def _encode_chats(chats: Sequence[tuple[Conversation, str, str]], tokenizer: Tokenizer) -> list[Document]:
    """Conversations with their languages and names, in Gemma 3's format; each assistant turn is scored."""
    rendered = render_chats([conversation for conversation, _, _ in chats], tokenizer)
    return [
        Document(
            tokens=chat.ids,
            scored=loss_mask(chat, learn="assistant"),
            language=language,
            id=name,
            num_bytes=learned_bytes(conversation),
        )
        for (conversation, language, name), chat in zip(chats, rendered, strict=True)
    ]
