"""Files of lines, plain or compressed, and files that are one document: read in chunks of work.

A chunk's bounds never decide what comes out, only how the work is cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import pyarrow

from sealion_jax.data import files
from sealion_jax.data.inputs.chunks import Chunk, Position
from sealion_jax.data.inputs.rows import FieldNames, Record, Skipped, record_from_json
from sealion_jax.errors import UserError

CHUNK_BYTES = 1 << 21
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinesChunk(Chunk):
    """Whole lines; each is a JSON object, or with `plain` a text. Blank lines only separate."""

    lines: bytes
    first_row: int
    plain: bool
    next: Position
    source_bytes: int

    def records(self, names: FieldNames) -> Iterator[Record | Skipped]:
        for number, line in enumerate(_split(self.lines), start=self.first_row):
            if not line.strip():
                continue
            if self.plain:
                yield Record(fields={names.text: line}, line=number)
            else:
                yield record_from_json(line, line=number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeFileChunk(Chunk):
    """A file that is one document."""

    content: bytes
    next: Position
    source_bytes: int

    def records(self, names: FieldNames) -> Iterator[Record | Skipped]:
        yield Record(fields={names.text: self.content.removeprefix(_BOM)}, line=1)


def read_lines(path: str, *, plain: bool, start: Position) -> Iterator[LinesChunk]:
    """The chunks of a file of lines from `start` on; UserError for one that is cut short or cannot be read.

    A compressed file is read from its beginning to get to `start`.
    """
    with _explained(path), _open(path, start.offset) as (file, progress):
        position, before = start, progress()
        while lines := file.read(CHUNK_BYTES):
            lines += file.readline()
            size = len(lines)
            number = position.rows + 1
            rows = lines.count(b"\n") + (not lines.endswith(b"\n"))
            if position.offset == 0:
                lines = lines.removeprefix(_BOM)
            position = Position(offset=position.offset + size, rows=position.rows + rows)
            now = progress()
            yield LinesChunk(
                lines=lines, first_row=number, plain=plain, next=position, source_bytes=now - before
            )
            before = now


def read_whole(path: str, *, start: Position) -> Iterator[WholeFileChunk]:
    """The one chunk of a file that is one document."""
    if start.offset:
        return
    with _explained(path), _open(path, 0) as (file, progress):
        content = file.read()
        yield WholeFileChunk(content=content, next=Position(offset=1, rows=1), source_bytes=progress())


def _split(lines: bytes) -> list[bytes]:
    parts = lines.removesuffix(b"\n").split(b"\n")
    return [part.removesuffix(b"\r") for part in parts]


@contextlib.contextmanager
def _open(path: str, offset: int) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The content from byte `offset` on, decompressed, and how many stored bytes were read so far."""
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(files.open_binary(path))
        if path.endswith(".gz"):
            content = stack.enter_context(gzip.GzipFile(fileobj=stored))
        elif path.endswith(".zst"):
            # Arrow's stream says when a file is cut short; the reader of the zstandard package just ends.
            source = pyarrow.PythonFile(stored, "r")
            content = stack.enter_context(pyarrow.CompressedInputStream(source, "zstd"))
        else:
            stored.seek(offset)
            yield stored, stored.tell
            return
        if not files.size(path):
            raise EOFError("it has no bytes")
        file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, content), 1 << 20))
        while offset > 0:
            offset -= len(file.read(min(offset, 1 << 22))) or offset
        yield file, stored.tell


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read to its end ({error}); it may be cut short: copy or compress it again"
        ) from error
