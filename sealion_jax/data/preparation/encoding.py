"""Rows of text turned into what a token store keeps: the part of `prepare` that is worth parallel workers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable

import numpy as np

from sealion_jax.data.inputs.rows import Document, FieldNames, Skipped
from sealion_jax.data.inputs.sources import Chunk
from sealion_jax.data.store.encoded_rows import EncodedRows, refuse_too_many_languages
from sealion_jax.data.store.token_store import TOKEN_DTYPE
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

_NO_TOKENS = np.zeros(0, TOKEN_DTYPE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Which documents are kept out of the store, and the JSONL file that gets them.

    A document's own text decides, by a seeded hash: the same document is held out wherever it stands, and two
    copies of it never end up on both sides.
    """

    share: float
    file: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"the share to hold out is {self.share}; it must be above 0 and below 1")

    def takes(self, text: str) -> bool:
        """Whether the document with this text is held out."""
        digest = hashlib.sha256(f"{self.seed}\n{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingTask:
    """A chunk of source number `source`, whose path is `path`."""

    source: int
    path: str
    chunk: Chunk


def make_encoder(
    model_bytes: bytes, names: FieldNames, hold_out: HoldOut | None
) -> Callable[[EncodingTask], EncodedRows]:
    """A function from a task to its encoded rows, with a tokenizer of its own."""
    tokenizer = Tokenizer(model_bytes)
    return lambda task: encode(task, tokenizer, names=names, hold_out=hold_out)


def encode(
    task: EncodingTask, tokenizer: Tokenizer, *, names: FieldNames, hold_out: HoldOut | None
) -> EncodedRows:
    """What becomes of a chunk's rows, in their order; UserError for too many languages."""
    kept, held_out, skipped = [], [], []
    for row in task.chunk.rows(names):
        if isinstance(row, Skipped):
            skipped.append(row)
        elif hold_out is not None and hold_out.takes(row.text):
            held_out.append(row)
        else:
            kept.append(row)
    languages = tuple(dict.fromkeys(document.language for document in kept))
    refuse_too_many_languages(len(languages))
    index = {language: i for i, language in enumerate(languages)}
    ids = tokenizer.encode_arrays([document.text for document in kept])
    bos, eos = np.array([tokenizer.bos_id], TOKEN_DTYPE), np.array([tokenizer.eos_id], TOKEN_DTYPE)
    pieces = [piece for document in ids for piece in (bos, document, eos)]
    return EncodedRows(
        rows=len(kept) + len(held_out) + len(skipped),
        tokens=np.concatenate([_NO_TOKENS, *pieces], dtype=TOKEN_DTYPE, casting="unsafe"),
        lengths=np.array([len(document) + 2 for document in ids], np.int64),
        text_bytes=np.array([len(document.text.encode()) for document in kept], np.int64),
        lines=np.array([document.line for document in kept], np.int64),
        language_names=languages,
        languages=np.array([index[document.language] for document in kept], np.uint16),
        skip_reasons=tuple(row.reason for row in skipped),
        skipped=b"".join(_skipped_line(task.path, row) for row in skipped),
        num_held_out=len(held_out),
        held_out=b"".join(_held_out_line(task.path, document) for document in held_out),
    )


def _skipped_line(path: str, row: Skipped) -> bytes:
    return _json_line({"file": path, "line": row.line, "reason": row.reason, "detail": row.detail})


def _held_out_line(path: str, document: Document) -> bytes:
    name = document.id or f"{os.path.basename(path)}:{document.line}"
    return _json_line({"text": document.text, "lang": document.language, "source": path, "id": name})


def _json_line(fields: dict[str, object]) -> bytes:
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode()
