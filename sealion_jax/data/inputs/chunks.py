"""What every source is read as: chunks of rows, each a piece of work for a worker process."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator

from sealion_jax.data.inputs.rows import Document, FieldNames, Record, Skipped, document_from_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """How far a source is read: `offset` is its reader's own (bytes, or rows), `rows` what lies before it."""

    offset: int = 0
    rows: int = 0


class Chunk(abc.ABC):
    """Some consecutive rows of a source, and where the chunk after it begins."""

    next: Position
    source_bytes: int

    @abc.abstractmethod
    def records(self, names: FieldNames) -> Iterator[Record | Skipped]:
        """The rows as they are there; a plain text is a row of `names.text` alone."""

    def rows(self, names: FieldNames) -> Iterator[Document | Skipped]:
        """The rows as texts."""
        for row in self.records(names):
            yield row if isinstance(row, Skipped) else document_from_fields(row.fields, names, line=row.line)
