"""What the user names as inputs, as a list of sources that can be read in chunks.

An input is a file, a folder, a pattern, or `tfds:...`; local or gs://. The suffix tells the format:

    .jsonl .ndjson .json (.gz .zst)    a JSON object a line
    .txt .text .md (.gz .zst)          a document a file, or a document a line
    .parquet .pq                       a document a row
    .array_record .arrayrecord         a document a record: JSON, or text

Chats and pairs are in rows of fields: plain text has none.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import fsspec

from sealion_jax.data import files
from sealion_jax.data.inputs.chunks import Chunk, Position
from sealion_jax.data.inputs.record_files import (
    TfdsName,
    open_tfds,
    read_array_record,
    read_parquet,
    read_tfds,
)
from sealion_jax.data.inputs.rows import FieldNames
from sealion_jax.data.inputs.text_files import read_lines, read_whole
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.errors import UserError

Format = Literal["jsonl", "text", "parquet", "array_record", "tfds"]

_SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".array_record", ".arrayrecord"), "array_record"),
}
_PACKED = (".gz", ".zst")
# Beside files of these suffixes, a .json file or one of these names tells of them and is no input.
_ROWS = {suffix for suffix, form in _SUFFIXES.items() if form != "text" and suffix != ".json"}
_ABOUT = ("readme", "license", "licence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How sources are read.

    Attributes:
        kind: what the rows hold.
        format: of every input, whatever its suffix; None goes by the suffix.
        names: where a row keeps its text, language and id.
        text_unit: in plain text, what a document is.
        record: in ArrayRecord, what a record's bytes are.
    """

    kind: StoreKind = "text"
    format: Literal["jsonl", "text", "parquet", "array_record"] | None = None
    names: FieldNames = dataclasses.field(default_factory=FieldNames)
    text_unit: Literal["file", "line"] = "file"
    record: Literal["json", "text"] = "json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One file, or one split of a TensorFlow data set, to read from the front to the back."""

    path: str
    format: Format

    @property
    def is_local_file(self) -> bool:
        return self.format != "tfds" and not files.is_remote(self.path)

    def stored_files(self) -> list[str]:
        """The files that hold it."""
        return open_tfds(TfdsName.parse(self.path))[0] if self.format == "tfds" else [self.path]

    def size_bytes(self) -> int:
        return sum(files.size(path) for path in self.stored_files())

    def sha256(self, on_bytes: Callable[[int], object] = lambda _: None) -> str:
        """sha256 over its files' bytes, one after the other, in hex; calls `on_bytes` as it goes."""
        digest = hashlib.sha256()
        for path in self.stored_files():
            with files.open_binary(path) as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
                    on_bytes(len(piece))
        return digest.hexdigest()

    def chunks(self, options: ReadOptions, *, start: Position) -> Iterator[Chunk]:
        """The source from `start` on. Joined, the rows are the same wherever it was interrupted.

        Raises:
            UserError: the file is cut short or damaged, or has no such column.
        """
        if self.format == "jsonl":
            return read_lines(self.path, plain=False, start=start)
        if self.format == "text" and options.text_unit == "line":
            return read_lines(self.path, plain=True, start=start)
        if self.format == "text":
            return read_whole(self.path, start=start)
        if self.format == "parquet":
            return read_parquet(self.path, options.names, kind=options.kind, start=start)
        if self.format == "array_record":
            return read_array_record(self.path, record=options.record, start=start)
        return read_tfds(TfdsName.parse(self.path), options.names, kind=options.kind, start=start)


def find_sources(
    inputs: Sequence[str], options: ReadOptions, *, say: Callable[[str], object] = lambda line: None
) -> list[Source]:
    """The sources that `inputs` name, in that order; in a folder or a pattern, in the order of their paths.

    `say` is told, in a line each, which files of a folder or a pattern are passed over.

    Raises:
        UserError: nothing is there, a suffix is unknown, a file is named twice, or chats are looked for in
            plain text.
    """
    sources = [source for name in inputs for source in _find(name, options, say)]
    seen: set[str] = set()
    for source in sources:
        place = os.path.realpath(source.path) if source.is_local_file else source.path
        if place in seen:
            raise UserError(f"{source.path} is named twice; name every input once")
        seen.add(place)
        is_plain = source.format == "text" or (source.format == "array_record" and options.record == "text")
        if is_plain and options.kind != "text":
            raise UserError(
                f"{source.path} is plain text, and {options.kind} are rows with fields; give JSONL, "
                f"Parquet or ArrayRecord with JSON, or leave out --kind {options.kind}"
            )
    return sources


def _find(name: str, options: ReadOptions, say: Callable[[str], object]) -> list[Source]:
    if name.startswith("tfds:"):
        TfdsName.parse(name)
        return [Source(path=name, format="tfds")]
    paths, kind = _expand(name)
    if kind == "file":
        return [Source(path=name, format=options.format or _format_of(name))]
    formats: dict[str, Format | None] = {path: options.format or _known_format(path) for path in paths}
    if kind == "folder" and options.format is None:
        formats |= dict.fromkeys(_descriptions(paths))
    sources = [Source(path=path, format=form) for path, form in formats.items() if form is not None]
    others = [os.path.basename(path) for path, form in formats.items() if form is None]
    if others:
        more = ", ..." if len(others) > 3 else ""
        say(f"files passed over in {name}: {len(others):,} ({', '.join(others[:3])}{more})")
    if not sources:
        raise UserError(
            f"{name}: no input there; expected a file, or a folder or pattern with {_known()} in it"
        )
    return sources


def _expand(name: str) -> tuple[list[str], Literal["file", "folder", "pattern"]]:
    """The files that a name stands for, and what it is; hidden files are not found unless a pattern does."""
    if not files.is_remote(name):
        if os.path.isfile(name):
            return [name], "file"
        is_folder = os.path.isdir(name)
        pattern = os.path.join(glob.escape(name), "**", "*") if is_folder else name
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        return paths, "folder" if is_folder else "pattern"
    system, inner = fsspec.core.url_to_fs(name)
    if system.isfile(inner):
        return [name], "file"
    is_folder = system.isdir(inner)
    found = system.find(inner) if is_folder else system.glob(inner)
    if is_folder or "/." not in inner:  # a pattern may name hidden files, as on this machine
        found = [path for path in found if "/." not in path.removeprefix(inner.rstrip("/"))]
    return sorted(system.unstrip_protocol(path) for path in found), "folder" if is_folder else "pattern"


def _descriptions(paths: Sequence[str]) -> list[str]:
    """Of the files in a folder, those that tell of its files of rows: README.md, dataset_info.json, ..."""
    suffixes = {path: _suffix(path) for path in paths}
    if not _ROWS.intersection(suffixes.values()):
        return []
    return [
        path
        for path, suffix in suffixes.items()
        if suffix == ".json" or os.path.basename(path).partition(".")[0].lower() in _ABOUT
    ]


def _format_of(path: str) -> Format:
    form = _known_format(path)
    if form is None:
        raise UserError(f"{path}: its suffix tells no format; expected {_known()}, or say it with --format")
    return form


def _known_format(path: str) -> Format | None:
    form = _SUFFIXES.get(_suffix(path))
    return form if form in ("jsonl", "text") or not path.endswith(_PACKED) else None


def _suffix(path: str) -> str:
    """The suffix that tells the format: of `a.jsonl.gz`, `.jsonl`."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    return os.path.splitext(stem)[1] if suffix in _PACKED else suffix


def _known() -> str:
    return " ".join(_SUFFIXES)
