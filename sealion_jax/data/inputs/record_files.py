"""Parquet, ArrayRecord and TensorFlow Datasets, read in chunks of work like `text_files`."""

from __future__ import annotations

import dataclasses
import functools
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from sealion_jax.data import files
from sealion_jax.data.inputs.chunks import Chunk, Position
from sealion_jax.data.inputs.kinds import content_fields, require_columns
from sealion_jax.data.inputs.rows import FieldNames, Record, Skipped, not_utf8, record_from_json
from sealion_jax.data.inputs.text_files import CHUNK_BYTES
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetChunk(Chunk):
    """Some rows of a Parquet file, as an Arrow stream."""

    table: bytes
    first_row: int
    next: Position
    source_bytes: int

    def records(self, names: FieldNames) -> Iterator[Record | Skipped]:
        table = pyarrow.ipc.open_stream(self.table).read_all()
        columns = {name: _cells(table.column(name)) for name in table.column_names}
        for i in range(table.num_rows):
            line, fields = self.first_row + i, {name: column[i] for name, column in columns.items()}
            error = next((value for value in fields.values() if isinstance(value, Exception)), None)
            if isinstance(error, UnicodeDecodeError):
                yield not_utf8(error, line=line)
            elif error is not None:
                yield Skipped(reason="bad_shape", line=line, detail=str(error)[:200])
            else:
                yield Record(fields=fields, line=line)


def _cells(column: pyarrow.ChunkedArray) -> list[object]:
    """The values of a column; in the place of one that Python cannot hold, such as bad UTF-8, the error."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_cell(value) for value in column]


def _cell(value: pyarrow.Scalar) -> object:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return error


def read_parquet(
    path: str, names: FieldNames, *, kind: StoreKind = "text", start: Position
) -> Iterator[ParquetChunk]:
    """The chunks of a Parquet file from `start` on; UserError for a file or columns that cannot be used."""
    with files.open_binary(path) as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} cannot be read as Parquet ({error}); copy or write it again") from error
        columns = _parquet_columns(path, file.schema_arrow, names, kind)
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


def _parquet_columns(path: str, schema: pyarrow.Schema, names: FieldNames, kind: StoreKind) -> list[str]:
    require_columns(path, "column", schema.names, kind, text=names.text)
    if kind == "text":
        held = schema.field(names.text).type
        held = held.value_type if pyarrow.types.is_dictionary(held) else held
        if not any(_is(held) for _is in _TEXT_TYPES):
            raise UserError(f"column {names.text!r} of {path} has type {held}, not text; name another one")
    wanted = (*content_fields(kind, text=names.text), names.language_field, names.id)
    return [name for name in dict.fromkeys(wanted) if name in schema.names]


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
class ArrayRecordChunk(Chunk):
    """Rows [start, stop) of an ArrayRecord file, which the worker reads itself."""

    path: str
    record: Literal["json", "text"]
    start: int
    next: Position
    source_bytes: int

    def records(self, names: FieldNames) -> Iterator[Record | Skipped]:
        reader = _open_array_record(self.path)
        try:
            records = reader.read(self.start, self.next.offset)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{self.path} is damaged ({error}); copy or write it again") from None
        finally:
            reader.close()
        for line, record in enumerate(records, start=self.start + 1):
            if self.record == "json":
                yield record_from_json(record, line=line)
            else:
                yield Record(fields={names.text: record}, line=line)


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
class TfdsChunk(Chunk):
    """Rows of a TensorFlow Datasets split, which the worker reads itself."""

    name: TfdsName
    start: int
    next: Position
    source_bytes: int

    def records(self, names: FieldNames) -> Iterator[Record | Skipped]:
        data = open_tfds(self.name)[1]
        for i in range(self.start, self.next.offset):
            yield Record(fields=data[i], line=i + 1)


def read_tfds(
    name: TfdsName, names: FieldNames, *, kind: StoreKind = "text", start: Position
) -> Iterator[TfdsChunk]:
    """The chunks of a TensorFlow Datasets split from `start` on; UserError when it has no such fields."""
    stored, data = open_tfds(name)
    if len(data):
        _check_tfds_fields(f"tfds:{name.name}", data[0], names, kind)
    size = sum(files.size(path) for path in stored)
    for first, stop, share in _even_cuts(len(data), size, start):
        yield TfdsChunk(name=name, start=first, next=Position(offset=stop, rows=stop), source_bytes=share)


def _check_tfds_fields(where: str, row: Mapping[str, object], names: FieldNames, kind: StoreKind) -> None:
    require_columns(where, "field", list(row), kind, text=names.text)
    if kind == "text":
        return
    for name in content_fields(kind, text=names.text):
        if name in row and not isinstance(row[name], bytes | str):
            raise UserError(
                f"{where}: its field {name!r} is no string, and a data set keeps messages in columns; write "
                f"its rows as JSONL, or prepare it with strings ({kind} without messages)"
            )


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
