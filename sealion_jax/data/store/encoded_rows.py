"""What a store's writer is given, and what it counts of it."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64, UInt16, UInt32

from sealion_jax.errors import UserError

MAX_LANGUAGES = 1000  # far more than any corpus has, far fewer than a field of names or dates


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """What became of some consecutive rows of one source: documents for the store, rows held out or skipped.

    `tokens` are the documents one after the other, as `token_store` has them; the other arrays have one
    element a document. Of chats and pairs alone there are `learned_start` and `learned_stop`. `skipped` and
    `held_out` are JSON lines, a row each.
    """

    rows: int
    tokens: UInt32[np.ndarray, " tokens"]
    lengths: Int64[np.ndarray, " documents"]
    text_bytes: Int64[np.ndarray, " documents"]
    lines: Int64[np.ndarray, " documents"]
    language_names: tuple[str, ...]
    languages: UInt16[np.ndarray, " documents"]
    learned_start: Int32[np.ndarray, " documents"] | None = None
    learned_stop: Int32[np.ndarray, " documents"] | None = None
    skip_reasons: tuple[str, ...] = ()
    skipped: bytes = b""
    num_held_out: int = 0
    held_out: bytes = b""


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What an unfinished store holds so far. Per language: [documents, tokens, bytes].

    It is added to in place: a copy for each piece of work would make many files quadratic.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    held_out: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    languages: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    source_rows: dict[int, int] = dataclasses.field(default_factory=dict)
    source_documents: dict[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: dict) -> Counts:
        """The counts of which `fields` is what `dataclasses.asdict` and JSON made."""
        by_source = {
            name: {int(source): number for source, number in fields.get(name, {}).items()}
            for name in ("source_rows", "source_documents")
        }
        return cls(**{**fields, **by_source})

    def add(self, encoded: EncodedRows, *, source: int) -> None:
        """Counts these rows of source number `source` too."""
        self.rows += encoded.rows
        self.documents += len(encoded.lengths)
        self.tokens += len(encoded.tokens)
        self.held_out += encoded.num_held_out
        for reason in encoded.skip_reasons:
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        documents, tokens, size = (
            _by_language(encoded, x) for x in (None, encoded.lengths, encoded.text_bytes)
        )
        for i, name in enumerate(encoded.language_names):
            before = self.languages.get(name, [0, 0, 0])
            self.languages[name] = [before[0] + documents[i], before[1] + tokens[i], before[2] + size[i]]
        self.source_rows[source] = self.source_rows.get(source, 0) + encoded.rows
        self.source_documents[source] = self.source_documents.get(source, 0) + len(encoded.lengths)


def refuse_too_many_languages(number: int) -> None:
    """UserError for more languages than there can be: then the language field is something else."""
    if number > MAX_LANGUAGES:
        raise UserError(
            f"more than {MAX_LANGUAGES:,} languages; is the language field the right one? "
            "--language-field names another, --language fixes one for all rows"
        )


def _by_language(encoded: EncodedRows, values: np.ndarray | None) -> list[int]:
    """The sum of `values`, one a document, over each language's documents; of None, their number."""
    # bincount sums in float64, which is exact up to 2**53.
    sums = np.bincount(encoded.languages, values, minlength=len(encoded.language_names))
    return sums.astype(np.int64).tolist()
