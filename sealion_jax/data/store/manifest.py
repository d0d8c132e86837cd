"""What a token store says of itself: the schema of its manifest.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal, get_args

from sealion_jax.errors import UserError

StoreKind = Literal["text", "chats", "pairs"]
"""What the documents of a store are; see `token_store`."""

FORMAT = "sealion_jax token store"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTotals:
    """Of one language's documents: their number, tokens (control tokens too), and bytes of UTF-8 text.

    Of conversations, the bytes are those of what is learned.
    """

    language: str
    documents: int
    tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text to a token of text; <bos> and <eos> are not text. Only of stores of texts."""
        return self.bytes / max(1, self.tokens - 2 * self.documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One input: where it was, what it held when it was read, and what became of its rows."""

    path: str
    format: str
    bytes: int
    sha256: str
    rows: int
    documents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of the store."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreTokenizer:
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json. `rows` = `documents` + the sum of `skipped` + `held_out`.

    A document's language is an index into `languages`, which are in order of first appearance. A row of pairs
    makes two documents; `held_out` and `skipped` are rows.
    """

    rows: int
    documents: int
    tokens: int
    bytes: int
    held_out: int
    skipped: dict[str, int]
    languages: tuple[LanguageTotals, ...]
    tokenizer: StoreTokenizer
    sources: tuple[SourceFile, ...]
    settings: dict[str, object]
    shard_tokens: int
    shards: tuple[StoredFile, ...]
    arrays: tuple[StoredFile, ...]
    held_out_file: StoredFile | None = None
    kind: StoreKind = "text"
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        if self.kind == "text":  # as before there were others, for the same bytes
            del fields["kind"]
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """The manifest in `text`; `where` names its file in the UserError for one that cannot be used."""
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise UserError(f"{where} is not the manifest of a token store; run prepare to make one")
            if fields["format_version"] != FORMAT_VERSION:
                raise UserError(
                    f"{where} has format version {fields['format_version']}, this program reads "
                    f"{FORMAT_VERSION}; prepare the store again with this version"
                )
            if fields.get("kind", "text") not in get_args(StoreKind):
                raise UserError(
                    f"{where} is of kind {fields['kind']!r}, this program reads "
                    f"{', '.join(get_args(StoreKind))}; use the version that made it"
                )
            fields["languages"] = tuple(LanguageTotals(**x) for x in fields["languages"])
            fields["tokenizer"] = StoreTokenizer(**fields["tokenizer"])
            fields["sources"] = tuple(SourceFile(**x) for x in fields["sources"])
            fields["shards"] = tuple(StoredFile(**x) for x in fields["shards"])
            fields["arrays"] = tuple(StoredFile(**x) for x in fields["arrays"])
            if fields["held_out_file"] is not None:
                fields["held_out_file"] = StoredFile(**fields["held_out_file"])
            return cls(**fields)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} is damaged ({error}); copy the store again or run prepare again"
            ) from None
