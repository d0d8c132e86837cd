"""Every input format gives the same documents; bad rows are named; broken files are refused."""

from __future__ import annotations

import gzip
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealion_jax.data.inputs import record_files, text_files
from sealion_jax.data.inputs.rows import Document, FieldNames, Skipped
from sealion_jax.data.inputs.sources import ReadOptions, Source, find_sources
from sealion_jax.data.inputs.text_files import Position
from sealion_jax.errors import UserError
from tests.tiny_text import SENTENCES

ROWS = [
    {"text": f"{text}\n{i} {text[::-1]}", "lang": language, "id": f"{language}-{i}", "n": i}
    for i in range(20)
    for language, text in SENTENCES.items()
]


def lines_of(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(path: Path) -> None:
    path.write_bytes(lines_of(ROWS))


def write_gz(path: Path) -> None:
    # Two members, as `cat a.gz b.gz` makes.
    path.write_bytes(gzip.compress(lines_of(ROWS[:30])) + gzip.compress(lines_of(ROWS[30:])))


def write_zst(path: Path) -> None:
    path.write_bytes(zstandard.compress(lines_of(ROWS[:30])) + zstandard.compress(lines_of(ROWS[30:])))


def write_parquet(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, path, row_group_size=37)


def write_parquet_dictionary(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    for i, name in enumerate(("text", "lang")):
        table = table.set_column(i, name, table.column(name).dictionary_encode())
    pyarrow.parquet.write_table(table, path)


def write_array_record(path: Path) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
    "b.parquet": write_parquet_dictionary,
    "a.array_record": write_array_record,
}


def read(
    source: Source, options: ReadOptions | None = None, start: Position | None = None
) -> list[Document | Skipped]:
    options, start = options or ReadOptions(), start or Position()
    return [row for chunk in source.chunks(options, start=start) for row in chunk.rows(options.names)]


def one(path: Path, options: ReadOptions | None = None) -> list[Document | Skipped]:
    options = options or ReadOptions()
    (source,) = find_sources([str(path)], options)
    return read(source, options)


EXPECTED = [
    Document(text=row["text"], language=row["lang"], id=row["id"], line=i + 1) for i, row in enumerate(ROWS)
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that a small file has many."""
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 600)
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 600)


# --- formats


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_gives_the_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert one(tmp_path / name) == EXPECTED


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", WRITERS)
def test_reading_goes_on_from_after_any_chunk(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    (source,) = find_sources([str(tmp_path / name)], ReadOptions())
    chunks = list(source.chunks(ReadOptions(), start=Position()))
    assert len(chunks) > 3
    assert sum(chunk.source_bytes for chunk in chunks) == source.size_bytes()
    for chunk in chunks[:: len(chunks) // 3]:
        assert read(source, start=chunk.next) == EXPECTED[chunk.next.rows :]
    assert read(source, start=chunks[-1].next) == []


def test_array_record_of_plain_texts(tmp_path: Path) -> None:
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for row in ROWS:
        writer.write(row["text"].encode())
    writer.close()
    found = one(tmp_path / "a.array_record", ReadOptions(record="text"))
    assert [(x.text, x.line) for x in found if isinstance(x, Document)] == [
        (x.text, x.line) for x in EXPECTED
    ]


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{2 - i}.txt").write_bytes(f"text {2 - i}\r\n\n end \n".encode())
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress("\ufeffpacked".encode()))
    options = ReadOptions(names=FieldNames(language="id"))
    sources = find_sources([str(tmp_path)], options)
    found = [row for source in sources for row in read(source, options)]
    texts = [*(f"text {i}\r\n\n end \n" for i in range(3)), "packed"]
    assert found == [Document(text=text, language="id", id=None, line=1) for text in texts]
    assert read(sources[0], options, start=Position(offset=1, rows=1)) == []


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_is_a_document(tmp_path: Path, end: str) -> None:
    """Blank lines only separate; the line's number counts them."""
    texts = [f"baris {i} \u2028 and on" for i in range(100)]
    path = tmp_path / "lines.txt"
    path.write_bytes(("\ufeff" + f"{end}{end}".join(texts)).encode())
    found = one(path, ReadOptions(text_unit="line"))
    assert found == [
        Document(text=text, language="und", id=None, line=2 * i + 1) for i, text in enumerate(texts)
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30),
    chunk_bytes=st.integers(1, 200),
    last_newline=st.booleans(),
)
def test_cuts_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], chunk_bytes: int, last_newline: bool
) -> None:
    """Whatever the size of the chunks: every line once, with its number."""
    content = b"\n".join(json.dumps({"text": row}, ensure_ascii=False).encode() for row in rows)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content + b"\n" * (last_newline and bool(rows)))
    with monkeypatch.context() as patched:
        patched.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
        found = one(path)
    assert [row.line for row in found] == list(range(1, len(rows) + 1))
    assert [row.text if isinstance(row, Document) else row.reason for row in found] == [
        row if row.strip() else "empty" for row in rows
    ]


def test_fields_have_the_names_one_gives_them(tmp_path: Path) -> None:
    row = {"content": "teks", "text": "no", "tongue": "jv", "key": 7}
    (tmp_path / "a.jsonl").write_bytes(lines_of([row]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        names = FieldNames(text="content", language_field="tongue", id="key")
        expected = Document(text="teks", language="jv", id="7", line=1)
        assert one(tmp_path / file, ReadOptions(names=names)) == [expected]
        fixed = FieldNames(text="content", language_field="tongue", language="su")
        assert one(tmp_path / file, ReadOptions(names=fixed)) == [
            Document(text="teks", language="su", id=None, line=1)
        ]


# --- TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set in two configs, as `tfds build` leaves it."""
    import tensorflow_datasets as tfds

    class SeaRows(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="id"), tfds.core.BuilderConfig(name="th")]  # noqa: RUF012

        def _info(self):
            features = {"text": tfds.features.Text(), "lang": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, row in enumerate(ROWS):
                if self.builder_config and row["lang"] == self.builder_config.name:
                    yield f"{i:05d}", {"text": row["text"], "lang": row["lang"]}

    folder = tmp_path_factory.mktemp("tfds")
    builder = SeaRows(data_dir=str(folder), config="id", file_format="array_record")
    builder.download_and_prepare()
    assert "tensorflow" not in sys.modules
    return folder


@pytest.mark.usefixtures("small_chunks")
def test_tfds_data_sources(tfds_dir: Path) -> None:
    (source,) = find_sources([f"tfds:sea_rows/id:1.0.0?split=train&data_dir={tfds_dir}"], ReadOptions())
    found = read(source)
    assert {(x.text, x.language) for x in found if isinstance(x, Document)} == {
        (x.text, x.language) for x in EXPECTED if x.language == "id"
    }
    assert [x.line for x in found] == list(range(1, 21)), "the order is the data set's own"
    chunks = list(source.chunks(ReadOptions(), start=Position()))
    assert len(chunks) > 2 and sum(chunk.source_bytes for chunk in chunks) == source.size_bytes()
    assert read(source, start=chunks[1].next) == found[chunks[1].next.rows :]
    (part,) = find_sources([f"tfds:sea_rows/id?split=train[5:9]&data_dir={tfds_dir}"], ReadOptions())
    assert [x.text for x in read(part) if isinstance(x, Document)] == [
        x.text for x in found[5:9] if isinstance(x, Document)
    ]
    assert len(source.sha256()) == 64 and "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tfds:sea_rows/id", "no split"),
        ("tfds:?split=train", "no name"),
        ("tfds:sea_rows/id?split=train&shuffle=1", "unknown shuffle"),
        ("tfds:sea_rows/id?split=tests&data_dir={dir}", "cannot be read"),
        ("tfds:sea_rows/th?split=train&data_dir={dir}", "cannot be read"),
        ("tfds:no_such_rows?split=train&data_dir={dir}", "cannot be read"),
    ],
)
def test_bad_tfds_addresses(tfds_dir: Path, address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        (source,) = find_sources([address.format(dir=tfds_dir)], ReadOptions())
        read(source)


def test_tfds_without_the_field(tfds_dir: Path) -> None:
    options = ReadOptions(names=FieldNames(text="body"))
    (source,) = find_sources([f"tfds:sea_rows/id?split=train&data_dir={tfds_dir}"], options)
    with pytest.raises(UserError, match=r"no field 'body'.*'text'"):
        read(source, options)


# --- rows that cannot be used

BAD_ROWS = {
    b"{": "bad_json",
    b'["text"]': "bad_json",
    b"[" * 100_000: "bad_json",
    b'{"text": "a\xff"}': "not_utf8",
    b'{"text": "\\ud800"}': "lone_surrogate",
    b'{"text": "a", "lang": "\\udc00"}': "lone_surrogate",
    b'{"body": "a"}': "no_text",
    b'{"text": null}': "no_text",
    b'{"text": 5}': "text_not_a_string",
    b'{"text": ["a"]}': "text_not_a_string",
    b'{"text": "a", "lang": 5}': "language_not_a_string",
    b'{"text": " \\n\\u3000"}': "empty",
    "\u3000".encode(): "empty",
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.items(), ids=lambda x: str(x)[:30])
def test_bad_rows_are_named_and_do_not_harm_their_neighbours(tmp_path: Path, row: bytes, reason: str) -> None:
    good = b'{"text": "good", "lang": null}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, row, good]))
    first, bad, last = one(tmp_path / "a.jsonl")
    assert isinstance(bad, Skipped) and (bad.reason, bad.line) == (reason, 2)
    assert [first, last] == [Document(text="good", language="und", id=None, line=i) for i in (1, 3)]


def test_bad_rows_in_other_formats(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"a\xff", b" ", None, b"good"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b"good", b"a\xff", b" ", b"", b"good"):
        writer.write(record)
    writer.close()
    (tmp_path / "a.txt").write_bytes(b"good\na\xff\n\n\ngood")

    def outcome(name: str, **options) -> list[tuple[str, int]]:
        rows = one(tmp_path / name, ReadOptions(**options))
        return [(x.reason if isinstance(x, Skipped) else x.text, x.line) for x in rows]

    assert outcome("a.parquet") == [("good", 1), ("not_utf8", 2), ("empty", 3), ("no_text", 4), ("good", 5)]
    assert outcome("a.array_record", record="text") == [
        *(("good", 1), ("not_utf8", 2), ("empty", 3), ("empty", 4), ("good", 5))
    ]
    assert outcome("a.txt", text_unit="line") == [("good", 1), ("not_utf8", 2), ("good", 5)]
    assert outcome("a.txt") == [("not_utf8", 1)]
    (tmp_path / "b.txt").write_bytes(b"")
    assert outcome("b.txt") == [("empty", 1)]


# --- files that cannot be read


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.jsonl"])
@pytest.mark.parametrize("damage", ["cut short", "other bytes", "no bytes"])
def test_broken_files_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    broken = {"cut short": content[: len(content) - 20], "other bytes": b"x" * 500, "no bytes": b""}[damage]
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(UserError, match=r"cannot be read|is damaged") as refusal:
        one(tmp_path / name)
    assert name in str(refusal.value)


def test_flipped_bytes_in_records_are_refused(tmp_path: Path) -> None:
    """Both formats carry checksums of their records."""
    write_array_record(tmp_path / "a.array_record")
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, compression="zstd")
    for name in ("a.array_record", "a.parquet"):
        content = bytearray((tmp_path / name).read_bytes())
        content[300] ^= 0xFF
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read|is damaged"):
            one(tmp_path / name)


def test_parquet_without_such_a_text_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'body'; name one of .*'text'"):
        one(tmp_path / "a.parquet", ReadOptions(names=FieldNames(text="body")))
    with pytest.raises(UserError, match="has type int64, not text"):
        one(tmp_path / "a.parquet", ReadOptions(names=FieldNames(text="n")))


def test_parquet_whose_language_is_a_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    found = one(tmp_path / "a.parquet", ReadOptions(names=FieldNames(language_field="n")))
    assert {row.reason for row in found[1:] if isinstance(row, Skipped)} == {"language_not_a_string"}


# --- what is named as input


def test_folders_patterns_and_suffixes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.jsonl", "1.jsonl.zst", "3.txt", "4.parquet", "5.array_record", "notes.pdf", "6.csv.gz"):
        (tmp_path / name).write_bytes(b"x")

    def found(*inputs: str, **options) -> list[tuple[str, str]]:
        sources = find_sources([str(tmp_path / name) for name in inputs], ReadOptions(**options))
        return [(str(Path(source.path).relative_to(tmp_path)), source.format) for source in sources]

    everything = [
        *(("1.jsonl.zst", "jsonl"), ("3.txt", "text"), ("4.parquet", "parquet")),
        *(("5.array_record", "array_record"), ("b/2.jsonl", "jsonl")),
    ]
    assert found("") == everything
    assert found("3.txt", "1.jsonl.zst") == [("3.txt", "text"), ("1.jsonl.zst", "jsonl")]
    assert found("**/*.jsonl*") == [("1.jsonl.zst", "jsonl"), ("b/2.jsonl", "jsonl")]
    assert found("notes.pdf", format="text") == [("notes.pdf", "text")]
    for inputs, message in [
        (("notes.pdf",), "suffix tells no format"),
        (("6.csv.gz",), "suffix tells no format"),
        (("nothing",), "no input there"),
        (("*.xyz",), "no input there"),
        (("b", "b/2.jsonl"), "is named twice"),
        (("b", "b/../b/2.jsonl"), "is named twice"),
    ]:
        with pytest.raises(UserError, match=message):
            found(*inputs)


@pytest.mark.parametrize("place", ["here", "bucket"])
def test_what_tells_of_a_folder_s_rows_is_no_input(tmp_path: Path, place: str) -> None:
    """README.md, *.json and hidden files, but only beside files of rows, and only in folders."""
    folder = f"{tmp_path if place == 'here' else f'memory://{uuid.uuid4().hex}'}/texts"
    system = fsspec.filesystem("file" if place == "here" else "memory")

    def put(*names: str) -> None:
        for name in names:
            system.makedirs(f"{folder}/{name}".rpartition("/")[0], exist_ok=True)
            system.pipe_file(f"{folder}/{name}", b"x")

    def found(name: str, **options) -> tuple[list[str], list[str]]:
        said: list[str] = []
        sources = find_sources([name], ReadOptions(**options), say=said.append)
        return [source.path.partition("/texts/")[2] for source in sources], said

    put("README.md", "info.json", "d/b.json.gz", "c.txt", ".git/x.jsonl", ".hidden.jsonl")
    everything = ["README.md", "c.txt", "d/b.json.gz", "info.json"]
    assert found(folder) == (everything, [])
    put("a.parquet", "image.png")
    told = f"files passed over in {folder}: 4 (README.md, b.json.gz, image.png, ...)"
    assert found(folder) == (["a.parquet", "c.txt"], [told])
    assert found(f"{folder}/*.json") == (["info.json"], [])
    told = f"files passed over in {folder}/*.[jp]*: 1 (image.png)"
    assert found(f"{folder}/*.[jp]*") == (["a.parquet", "info.json"], [told])
    assert found(folder, format="text") == (sorted([*everything, "a.parquet", "image.png"]), [])


def test_inputs_in_a_bucket(tmp_path: Path) -> None:
    """fsspec's in-memory file system stands for gs://."""
    bucket = f"memory://{uuid.uuid4().hex}"
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        WRITERS[name](tmp_path / name)
        fsspec.filesystem("memory").put(str(tmp_path / name), f"{bucket}/texts/{name}")
    for pattern in ("texts", "texts/*", "texts/a.jsonl"):
        for source in find_sources([f"{bucket}/{pattern}"], ReadOptions()):
            assert source.path.startswith("memory://") and read(source) == EXPECTED
            local = Source(path=str(tmp_path / Path(source.path).name), format=source.format)
            assert source.sha256() == local.sha256()
    assert len(find_sources([f"{bucket}/texts"], ReadOptions())) == 4
    fsspec.filesystem("memory").put(str(tmp_path / "a.jsonl"), f"{bucket}/r/a.array_record")
    with pytest.raises(UserError, match="from local files only"):
        read(find_sources([f"{bucket}/r"], ReadOptions())[0])


def test_bad_field_names() -> None:
    with pytest.raises(UserError, match="text field's name is empty"):
        FieldNames(text="")
    with pytest.raises(UserError, match="the language is empty"):
        FieldNames(language=" ")
