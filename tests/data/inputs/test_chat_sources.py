"""Every input format gives the same chats and pairs; rows and files that have none are named."""

from __future__ import annotations

import datetime
import gzip
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.inputs import record_files, text_files
from sealion_jax.data.inputs.chats import Example, chat_example, pair_example
from sealion_jax.data.inputs.chunks import Position
from sealion_jax.data.inputs.rows import FieldNames, Skipped
from sealion_jax.data.inputs.sources import ReadOptions, find_sources
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.errors import UserError
from tests.tiny_text import SENTENCES

WEATHER = json.dumps([{"name": "weather", "parameters": {"type": "object"}}])
CALL = {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Johor"}'}}


def says(role: str, content: str | None, **others: object) -> dict[str, object]:
    return {"role": role, "content": content, "tool_calls": None, "tool_call_id": None, **others}


CHATS = [
    {
        "messages": [
            says("user", text),
            says("assistant", None, tool_calls=[CALL]),
            says("tool", f"{i} 28°", tool_call_id="a"),
            says("assistant", text[::-1].strip()),
        ],
        "tools": WEATHER if i % 2 else None,
        "lang": language,
        "id": i,
    }
    for i in range(20)
    for language, text in SENTENCES.items()
]
PAIRS = [
    {
        "prompt": [says("user", text)],
        "chosen": f"{text} {i}",
        "rejected": f"{i} {text}",
        "lang": language,
        "id": f"{language}{i}",
    }
    for i in range(20)
    for language, text in SENTENCES.items()
]
ROWS: dict[StoreKind, list[dict]] = {"chats": CHATS, "pairs": PAIRS}
READ = {"chats": chat_example, "pairs": pair_example}


def lines_of(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=37)


def write_array_record(path: Path, rows: list[dict]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


WRITERS: dict[str, Callable[[Path, list[dict]], object]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines_of(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines_of(rows))),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(lines_of(rows))),
    "a.parquet": write_parquet,
    "a.array_record": write_array_record,
}


def read(
    path: Path | str, kind: StoreKind, *, start: Position | None = None, names: FieldNames | None = None
) -> list[Example | Skipped]:
    options = ReadOptions(kind=kind, names=names or FieldNames())
    (source,) = find_sources([str(path)], options)
    return [
        row if isinstance(row, Skipped) else READ[kind](row.fields, options.names, line=row.line)
        for chunk in source.chunks(options, start=start or Position())
        for row in chunk.records(options.names)
    ]


def outcome(path: Path | str, kind: StoreKind, **others) -> list[tuple[str, int]]:
    """The language of each row, or why it is skipped, and its line."""
    rows = read(path, kind, **others)
    return [(row.reason if isinstance(row, Skipped) else row.language, row.line) for row in rows]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_format_gives_the_chats_and_pairs(
    tmp_path: Path, name: str, kind: StoreKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any chunk on, with chunks of a few rows; what is their own can be read again."""
    for module in (text_files, record_files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2000)
    WRITERS[name](tmp_path / name, ROWS[kind])
    found = read(tmp_path / name, kind)
    parse = chat_from_fields if kind == "chats" else preference_from_fields
    assert [row.content for row in found if isinstance(row, Example)] == [parse(row) for row in ROWS[kind]]
    assert [(row.language, row.id, row.line) for row in found if isinstance(row, Example)] == [
        (row["lang"], str(row["id"]), i + 1) for i, row in enumerate(ROWS[kind])
    ]
    for row in found[::7]:
        assert isinstance(row, Example) and parse(json.loads(json.dumps(row.fields))) == row.content
    options = ReadOptions(kind=kind)
    (source,) = find_sources([str(tmp_path / name)], options)
    chunks = list(source.chunks(options, start=Position()))
    assert len(chunks) > 3
    middle = chunks[len(chunks) // 2].next
    assert read(tmp_path / name, kind, start=middle) == found[middle.rows :]


def test_languages_and_names(tmp_path: Path) -> None:
    fields = ({"tongue": "jv", "key": 7}, {"lang": None}, {"lang": ""}, {"lang": 5}, {"tongue": "\udc00"})
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({**PAIRS[0], **more}) for more in fields))
    assert outcome(tmp_path / "a.jsonl", "pairs") == [
        *(("id", 1), ("und", 2), ("und", 3), ("language_not_a_string", 4), ("id", 5))
    ]
    names = FieldNames(language_field="tongue", id="key")
    rows = read(tmp_path / "a.jsonl", "pairs", names=names)
    assert [(row.language, row.id) for row in rows if isinstance(row, Example)] == [
        ("jv", "7"),
        *[("und", None)] * 3,
    ]
    assert isinstance(rows[4], Skipped) and rows[4].reason == "lone_surrogate"
    found = outcome(tmp_path / "a.jsonl", "pairs", names=FieldNames(language="su"))
    assert found == [("su", i + 1) for i in range(5)]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (b"{", "bad_json", "Expecting property name"),
        (b"[]", "bad_json", "a list, not an object"),
        (b'{"messages": "\xff"}', "not_utf8", "byte 0xff at 14"),
        (b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "unknown_role", r"'\ud800'"),
        (b'{"messages": [{"role": "' + b"x" * 9000 + b'"}]}', "unknown_role", "xxx"),
        (b'{"messages": [' + b"[" * 90 + b"]" * 90 + b"]}", "bad_shape", "message 1"),
        (b'{"messages": [{"role": ' + b"[" * 101 + b"]" * 101 + b"}]}", "bad_json", "nested more than 100"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json", "recursion"),
        (b'{"text": "a"}', "missing_field", "for text, leave out --kind chats"),
        (b'{"prompt": "a", "chosen": "b"}', "missing_field", "no completion; for pairs, add --kind pairs"),
        (b'{"prompt": "a"}', "missing_field", "no completion"),
        (b"{}", "missing_field", "neither messages nor a prompt; expected one of them"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_rows_do_not_harm_their_neighbours(tmp_path: Path, row: bytes, reason: str, detail: str) -> None:
    good = json.dumps({"messages": [says("user", "a"), says("assistant", "b")]}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, row, good]))
    first, bad, last = read(tmp_path / "a.jsonl", "chats")
    assert isinstance(first, Example) and isinstance(last, Example) and last.line == 3
    assert isinstance(bad, Skipped) and (bad.reason, bad.line) == (reason, 2)
    assert detail in bad.detail and len(bad.detail) < 400


# --- Parquet


def strings(*values: bytes) -> pyarrow.Array:
    """Strings that nobody has checked."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    """In a column of strings, and inside messages; neighbours are read."""
    texts = [b"a", b"b\xff", b"c", b"d"]
    roles = pyarrow.array(["user"] * 4)
    messages = pyarrow.StructArray.from_arrays([roles, strings(*texts)], ["role", "content"])
    prompts = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3, 4], pyarrow.int32()), messages)
    table = {"prompt": prompts, "completion": strings(b"x", b"y", b"z\xff", b"\xe0\xb8\xa1")}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", "chats")
    assert [row.reason if isinstance(row, Skipped) else row.line for row in found] == [
        *(1, "not_utf8", "not_utf8", 4)
    ]
    assert isinstance(found[3], Example) and found[3].fields["completion"] == "ม"


def test_parquet_messages_in_bytes_with_dates(tmp_path: Path) -> None:
    """Strings that were written as bytes; fields that nobody looks at, even what Python has no value for."""
    moments = pyarrow.array([0, 1_000, 1], pyarrow.timestamp("ns"))
    content = pyarrow.array([b"a", b"b", b"c"], pyarrow.binary())
    roles = pyarrow.array([b"user"] * 3, pyarrow.binary())
    messages = pyarrow.StructArray.from_arrays([roles, content, moments], ["role", "content", "when"])
    prompts = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), messages)
    table = pyarrow.table({"prompt": prompts, "completion": pyarrow.array(["x"] * 3)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", "chats")
    first = found[0]
    assert isinstance(first, Example) and first.content == chat_from_fields(
        {"prompt": "a", "completion": "x"}
    )
    prompt = first.fields["prompt"]
    assert isinstance(prompt, list) and isinstance(prompt[0]["when"], datetime.datetime)
    assert isinstance(found[1], Example) and [row.line for row in found] == [1, 2, 3]
    # Where pandas is installed, its type holds the odd nanosecond.
    assert isinstance(found[2], Example) or found[2].reason == "bad_shape"


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        (
            ("text",),
            "chats",
            r"no column 'prompt'; chats have messages, or prompt and completion, and it has \['text'",
        ),
        (("text",), "chats", r"for text, leave out --kind chats"),
        (("prompt",), "chats", r"no column 'completion'"),
        (("prompt", "chosen"), "chats", r"no column 'completion'.*for pairs, add --kind pairs"),
        (
            ("prompt", "chosen"),
            "pairs",
            r"no column 'rejected'; pairs have prompt, chosen and rejected, and it",
        ),
        (("messages",), "pairs", r"no column 'prompt'.*for chats, add --kind chats"),
        (("messages",), "text", r"no column 'text'.*--text-field; for chats, add --kind chats"),
        (("prompt", "chosen", "rejected"), "text", r"no column 'text'.*; for pairs, add --kind pairs"),
    ],
)
def test_parquet_without_such_columns(
    tmp_path: Path, columns: tuple[str, ...], kind: StoreKind, message: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({name: ["a"] for name in columns}), tmp_path / "a.parquet")
    options = ReadOptions(kind=kind)
    (source,) = find_sources([str(tmp_path / "a.parquet")], options)
    with pytest.raises(UserError, match=message):
        list(source.chunks(options, start=Position()))


def test_rows_of_messages_and_rows_of_prompts_in_one_parquet_file(tmp_path: Path) -> None:
    rows: list[Mapping[str, object]] = [
        {"messages": [says("user", "a"), says("assistant", "b")], "prompt": None, "completion": None},
        {"messages": None, "prompt": "a", "completion": "b"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet", "chats")
    assert isinstance(first, Example) and set(first.fields) == {"messages"}
    assert isinstance(second, Example) and second.fields == {"prompt": "a", "completion": "b"}


# --- inputs that hold no chats


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "folder"])
def test_plain_text_has_no_chats(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(lines_of(CHATS))
    (tmp_path / "folder" / "notes.txt").write_text("a")
    if name != "folder":
        (tmp_path / name).write_text("a")
    for kind in ROWS:
        with pytest.raises(
            UserError, match=rf"is plain text, and {kind} are rows .* leave out --kind {kind}"
        ):
            find_sources([str(tmp_path / name)], ReadOptions(kind=kind))
    assert find_sources([str(tmp_path / name)], ReadOptions())


def test_array_records_of_plain_text_have_no_chats(tmp_path: Path) -> None:
    write_array_record(tmp_path / "a.array_record", CHATS)
    with pytest.raises(UserError, match="is plain text, and chats are rows with fields"):
        find_sources([str(tmp_path / "a.array_record")], ReadOptions(kind="chats", record="text"))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set in two configs: prompts that are strings, and messages in columns."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class SeaChats(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [  # noqa: RUF012
            tfds.core.BuilderConfig(name="strings"),
            tfds.core.BuilderConfig(name="messages"),
        ]

        def _info(self):
            prompt = (
                text
                if self.builder_config and self.builder_config.name == "strings"
                else tfds.features.Sequence({"role": text, "content": text})
            )
            features = {"prompt": prompt, "chosen": text, "rejected": text, "completion": text, "lang": text}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            strings = bool(self.builder_config and self.builder_config.name == "strings")
            for i, row in enumerate(PAIRS[:20]):
                text = row["prompt"][0]["content"]
                prompt = text if strings else [{"role": "user", "content": text}]
                answers = {name: row["chosen"] for name in ("chosen", "completion")}
                yield (
                    f"{i:05d}",
                    {"prompt": prompt, **answers, "rejected": row["rejected"], "lang": row["lang"]},
                )

    folder = tmp_path_factory.mktemp("tfds")
    for config in ("strings", "messages"):
        builder = SeaChats(data_dir=str(folder), config=config, file_format="array_record")
        builder.download_and_prepare()
    assert "tensorflow" not in sys.modules
    return folder


def test_tfds_with_strings(tfds_dir: Path) -> None:
    address = f"tfds:sea_chats/strings?split=train&data_dir={tfds_dir}"
    pairs = read(address, "pairs")
    expected = [preference_from_fields({**row, "prompt": row["prompt"][0]["content"]}) for row in PAIRS[:20]]
    found = [row.content for row in pairs if isinstance(row, Example)]
    assert len(found) == 20 and all(pair in found for pair in expected)
    chats = read(address, "chats")
    assert [row.content.turns for row in chats if isinstance(row, Example)] == [
        pair.chosen.turns for pair in found
    ]
    assert {row.language for row in chats if isinstance(row, Example)} == set(SENTENCES)


def test_tfds_with_messages_in_columns(tfds_dir: Path) -> None:
    address = f"tfds:sea_chats/messages?split=train&data_dir={tfds_dir}"
    with pytest.raises(UserError, match=r"its field 'prompt' is no string.*write its rows as JSONL"):
        read(address, "pairs")
