"""Parquet, ArrayRecord and TensorFlow Datasets, read in chunks of work like `text_files`."""

from __future__ import annotations

import dataclasses
import functools
import urllib.parse
from collections.abc import Iterator
from typing import Any, Literal, cast

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from sealion_jax.data import files
from sealion_jax.data.inputs.rows import (
    Document,
    FieldNames,
    Skipped,
    document_from_fields,
    document_from_json,
    document_from_text,
)
from sealion_jax.data.inputs.text_files import CHUNK_BYTES, Position
from sealion_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetChunk:
    """Some rows of a Parquet file, as an Arrow stream."""

    table: bytes
    first_row: int
    next: Position
    source_bytes: int

    def rows(self, names: FieldNames) -> Iterator[Document | Skipped]:
        table = pyarrow.ipc.open_stream(self.table).read_all()
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        for i in range(table.num_rows):
            fields = {name: column[i] for name, column in columns.items()}
            yield document_from_fields(fields, names, line=self.first_row + i)


def read_parquet(path: str, names: FieldNames, *, start: Position) -> Iterator[ParquetChunk]:
    """The chunks of a Parquet file from `start` on; UserError for a file or columns that cannot be used."""
    with files.open_binary(path) as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} cannot be read as Parquet ({error}); copy or write it again") from error
        columns = _parquet_columns(path, file.schema_arrow, names)
        stored = files.size(path) / max(1, file.metadata.num_rows)
        done = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if done + rows <= start.offset:
                done += rows
                continue
            per_row = file.metadata.row_group(group).total_byte_size / max(1, rows)
            batch_rows = max(1, int(CHUNK_BYTES / max(1.0, per_row)))
            for batch in _parquet_batches(path, file, group, columns, batch_rows):
                wanted = batch.slice(max(0, start.offset - done))
                first, done = done + batch.num_rows - wanted.num_rows, done + batch.num_rows
                if wanted.num_rows:
                    yield ParquetChunk(
                        table=_as_stream(wanted),
                        first_row=first + 1,
                        next=Position(offset=done, rows=done),
                        source_bytes=round(done * stored) - round(first * stored),
                    )


def _parquet_columns(path: str, schema: pyarrow.Schema, names: FieldNames) -> list[str]:
    if names.text not in schema.names:
        raise UserError(f"{path} has no column {names.text!r}; name one of {schema.names} with --text-field")
    kind = schema.field(names.text).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(_is(kind) for _is in _TEXT_TYPES):
        raise UserError(f"column {names.text!r} of {path} has type {kind}, not text; name another one")
    return [name for name in (names.text, names.language_field, names.id) if name in schema.names]


_TEXT_TYPES = (
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
    pyarrow.types.is_string_view,
    pyarrow.types.is_binary,
    pyarrow.types.is_large_binary,
)


def _parquet_batches(
    path: str, file: pyarrow.parquet.ParquetFile, group: int, columns: list[str], batch_rows: int
) -> Iterator[pyarrow.RecordBatch]:
    try:
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=columns):
            yield _text_as_bytes(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read to its end ({error}); copy or write it again") from error


def _text_as_bytes(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    # A Parquet string need not be UTF-8; as bytes, each row is checked by itself.
    columns = []
    for column in batch.columns:
        plain = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        is_text = any(_is(plain.type) for _is in _TEXT_TYPES)
        columns.append(plain.cast(pyarrow.large_binary()) if is_text else plain)
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _as_stream(batch: pyarrow.RecordBatch) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(out, batch.schema) as stream:
        stream.write_batch(batch)
    return out.getvalue().to_pybytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordChunk:
    """Rows [start, stop) of an ArrayRecord file, which the worker reads itself."""

    path: str
    record: Literal["json", "text"]
    start: int
    next: Position
    source_bytes: int

    def rows(self, names: FieldNames) -> Iterator[Document | Skipped]:
        parse = document_from_json if self.record == "json" else document_from_text
        reader = _open_array_record(self.path)
        try:
            records = reader.read(self.start, self.next.offset)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{self.path} is damaged ({error}); copy or write it again") from None
        finally:
            reader.close()
        for i, record in enumerate(records):
            yield parse(record, names, line=self.start + i + 1)


def read_array_record(
    path: str, *, record: Literal["json", "text"], start: Position
) -> Iterator[ArrayRecordChunk]:
    """The chunks of an ArrayRecord file from `start` on; UserError for one that cannot be read."""
    if files.is_remote(path):
        raise UserError(f"ArrayRecord is read from local files only; copy {path} here first")
    reader = _open_array_record(path)
    total = reader.num_records()
    reader.close()
    for first, stop, size in _even_cuts(total, files.size(path), start):
        yield ArrayRecordChunk(
            path=path, record=record, start=first, next=Position(offset=stop, rows=stop), source_bytes=size
        )


def _open_array_record(path: str) -> Any:
    reader = array_record_module.ArrayRecordReader(path)
    # Without this question a file that is cut short reads as one with no records.
    if not reader.ok():
        raise UserError(f"{path} cannot be read as ArrayRecord; it may be cut short: copy or write it again")
    return reader


def _even_cuts(rows: int, stored_bytes: int, start: Position) -> Iterator[tuple[int, int, int]]:
    """(first row, row after the last, stored bytes) of cuts of about CHUNK_BYTES stored bytes each."""
    each = max(1, min(rows, int(CHUNK_BYTES * rows / max(1, stored_bytes))))
    for first in range(start.offset, rows, each):
        stop = min(first + each, rows)
        yield first, stop, stored_bytes * stop // rows - stored_bytes * first // rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsName:
    """`tfds:name/config:version?split=...&data_dir=...`, taken apart."""

    name: str
    split: str
    data_dir: str | None

    @classmethod
    def parse(cls, address: str) -> TfdsName:
        """The parts of `address`; UserError unless it has a name and a split."""
        name, _, query = address.removeprefix("tfds:").partition("?")
        options = dict(urllib.parse.parse_qsl(query.replace("+", "%2B")))
        unknown = sorted(set(options) - {"split", "data_dir"})
        if not name or unknown or "split" not in options:
            wrong = f"unknown {', '.join(unknown)}" if unknown else "no split" if name else "no name"
            raise UserError(
                f"{address}: {wrong}; expected tfds:name/config:version?split=train&data_dir=FOLDER"
            )
        return cls(name=name, split=options["split"], data_dir=options.get("data_dir"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsChunk:
    """Rows of a TensorFlow Datasets split, which the worker reads itself."""

    name: TfdsName
    start: int
    next: Position
    source_bytes: int

    def rows(self, names: FieldNames) -> Iterator[Document | Skipped]:
        data = open_tfds(self.name)[1]
        for i in range(self.start, self.next.offset):
            yield document_from_fields(data[i], names, line=i + 1)


def read_tfds(name: TfdsName, names: FieldNames, *, start: Position) -> Iterator[TfdsChunk]:
    """The chunks of a TensorFlow Datasets split from `start` on; UserError when it has no such field."""
    stored, data = open_tfds(name)
    fields = list(data[0]) if len(data) else [names.text]
    if names.text not in fields:
        raise UserError(
            f"tfds:{name.name} has no field {names.text!r}; name one of {fields} with --text-field"
        )
    size = sum(files.size(path) for path in stored)
    for first, stop, share in _even_cuts(len(data), size, start):
        yield TfdsChunk(name=name, start=first, next=Position(offset=stop, rows=stop), source_bytes=share)


@functools.lru_cache(maxsize=4)
def open_tfds(name: TfdsName) -> tuple[list[str], Any]:
    """The split's files, and the split as a random-access sequence of rows; strings come as bytes.

    Works without TensorFlow, on data that was prepared before; nothing is downloaded.

    Raises:
        UserError: no such data set, version or split, or not prepared, or not in the ArrayRecord format.
    """
    import tensorflow_datasets

    try:
        builder = cast(Any, tensorflow_datasets.builder(name.name, data_dir=name.data_dir))
        split = builder.info.splits[name.split]
        return [str(path) for path in split.filepaths], builder.as_data_source(split=name.split)
    except (ValueError, KeyError, OSError, AssertionError, NotImplementedError, ImportError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"tfds:{name.name}, split {name.split!r}, cannot be read ({first_line}); it must be prepared "
            "already, with file_format='array_record', under data_dir"
        ) from error
