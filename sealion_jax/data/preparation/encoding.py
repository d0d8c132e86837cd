"""Rows turned into what a token store keeps: the part of `prepare` that is worth parallel workers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from sealion_jax.data.chat.conversation import Conversation, Preference
from sealion_jax.data.chat.format import turn_texts
from sealion_jax.data.inputs.chats import Example, chat_example, pair_example
from sealion_jax.data.inputs.chunks import Chunk
from sealion_jax.data.inputs.rows import Document, Record, Skipped, document_from_fields
from sealion_jax.data.inputs.sources import ReadOptions
from sealion_jax.data.store.documents import encode_chats, encode_pairs, encode_texts
from sealion_jax.data.store.encoded_rows import EncodedRows
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Which rows are kept out of the store, and the JSONL file that gets them.

    A seeded hash decides: of a document's text; of the texts of a chat's turns, as the model gets them, so
    with the system's and the tools; of those of a pair's prompt. So the same row is held out wherever it
    stands, two copies of it never end up on both sides, and neither do two pairs of one prompt.
    """

    share: float
    file: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"the share to hold out is {self.share}; it must be above 0 and below 1")

    def takes(self, identity: str) -> bool:
        """Whether the row that is told from others by this text is held out."""
        digest = hashlib.sha256(f"{self.seed}\n{identity}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingTask:
    """A chunk of source number `source`, whose path is `path`."""

    source: int
    path: str
    chunk: Chunk


def make_encoder(
    model_bytes: bytes, read: ReadOptions, hold_out: HoldOut | None
) -> Callable[[EncodingTask], EncodedRows]:
    """A function from a task to its encoded rows, with a tokenizer of its own."""
    tokenizer = Tokenizer(model_bytes)
    return lambda task: encode(task, tokenizer, read=read, hold_out=hold_out)


def encode(
    task: EncodingTask, tokenizer: Tokenizer, *, read: ReadOptions, hold_out: HoldOut | None
) -> EncodedRows:
    """What becomes of a chunk's rows, in their order; UserError for too many languages."""
    kind = _KINDS[read.kind]
    kept, held_out, skipped = [], [], []
    for record in task.chunk.records(read.names):
        row = record
        if isinstance(row, Record):
            row = kind.read(row.fields, read.names, line=row.line)
        if isinstance(row, Skipped):
            skipped.append(row)
        elif hold_out is not None and hold_out.takes(kind.identity(row.content)):
            held_out.append(row)
        else:
            kept.append(row)
    encoded = kind.encode(
        [row.content for row in kept],
        tokenizer,
        lines=[row.line for row in kept],
        languages=[row.language for row in kept],
    )
    return dataclasses.replace(
        encoded,
        rows=len(kept) + len(held_out) + len(skipped),
        skip_reasons=tuple(row.reason for row in skipped),
        skipped=b"".join(_skipped_line(task.path, row) for row in skipped),
        num_held_out=len(held_out),
        held_out=b"".join(_held_out_line(task.path, row) for row in held_out),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """How rows of one kind are read, what tells one from another, and what the store keeps of them."""

    read: Callable[..., Document | Example | Skipped]
    identity: Callable[[Any], str]
    encode: Callable[..., EncodedRows]


def _conversation_identity(chat: Conversation) -> str:
    return json.dumps(turn_texts(chat))


def _prompt_identity(pair: Preference) -> str:
    return json.dumps(turn_texts(pair.chosen)[: pair.chosen.prompt_turns])


_KINDS: dict[StoreKind, _Kind] = {
    "text": _Kind(read=document_from_fields, identity=str, encode=encode_texts),
    "chats": _Kind(read=chat_example, identity=_conversation_identity, encode=encode_chats),
    "pairs": _Kind(read=pair_example, identity=_prompt_identity, encode=encode_pairs),
}


def _skipped_line(path: str, row: Skipped) -> bytes:
    return _json_line({"file": path, "line": row.line, "reason": row.reason, "detail": row.detail})


def _held_out_line(path: str, row: Document | Example) -> bytes:
    name = row.id or f"{os.path.basename(path)}:{row.line}"
    return _json_line({**row.fields, "lang": row.language, "source": path, "id": name})


def _json_line(fields: dict[str, object]) -> bytes:
    # Parts of a message that nobody looks at may hold what JSON cannot (a date, in Parquet) or UTF-8 cannot.
    try:
        return (json.dumps(fields, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(fields, default=str) + "\n").encode()
