"""The command on chats and pairs: what the stores hold, and what is held out."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sealion_jax.data.inputs import text_files
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.tokenizer import Tokenizer
from tests.prepare.prepare_command import (
    CHATS,
    PAIRS,
    ROWS_OF,
    check_documents,
    content_of,
    run,
    write_rows,
)
from tests.tiny_text import SENTENCES


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_a_store_of_every_row_in_order(
    tmp_path: Path, tokenizer_file: Path, kind: StoreKind, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ROWS_OF[kind]
    rows_file = write_rows(tmp_path / "rows.jsonl", rows)
    words = [rows_file, "--kind", kind, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words, "--strict") == 0
    tokenizer, store = Tokenizer.load(tokenizer_file), TokenStore.open(tmp_path / "store")
    assert store.kind == kind and store.verify() == []
    check_documents(store, rows, tokenizer)
    documents_of_a_row = store.num_documents // len(rows)
    assert store.origin(17 * documents_of_a_row) == (str(rows_file), 18)
    assert store.manifest.rows == len(rows) and store.manifest.settings["kind"] == kind
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert table["language"] == [kind, "tokens", "learned", "bytes"]
    for n, language in enumerate(SENTENCES):
        assert store.language_names[n] == language
        mine = store.languages == n
        tokens, size = np.diff(store.offsets)[mine].sum(), store.text_bytes[mine].sum()
        assert table[language] == ["60", f"{tokens:,}", f"{size:,}"]
    assert table["all"][0] == f"{len(rows):,}"


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_again_on_a_finished_store(
    tmp_path: Path,
    tokenizer_file: Path,
    kind: StoreKind,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row that is a chat and a pair: another kind, or another format, is another store."""
    rows = [{**row, "completion": row["chosen"], "text": "a"} for row in PAIRS[:9]]
    rows_file = write_rows(tmp_path / "rows.jsonl", rows)
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words, "--kind", kind) == 0
    references = tmp_path / "store" / "references"
    references.mkdir()
    (references / "0a.f32").write_bytes(b"1234")
    assert run(*words, "--kind", kind) == 0
    assert "nothing to do" in capsys.readouterr().out
    other = "pairs" if kind == "chats" else "chats"
    assert run(*words, "--kind", other) == 2
    assert "made with other options (kind)" in capsys.readouterr().err
    assert run(*words) == 2
    assert "made with other options (kind, chat_format)" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("sealion_jax.data.store.documents.CHAT_TEMPLATE", "another")
        assert run(*words, "--kind", kind) == 2
    assert "made with other options (chat_format)" in capsys.readouterr().err
    assert (references / "0a.f32").exists()
    assert run(*words, "--overwrite") == 0
    assert TokenStore.open(tmp_path / "store").kind == "text" and not references.exists()
    assert not (tmp_path / "store" / "learned_start.bin").exists()


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, tokenizer_file: Path, kind: StoreKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes and many small chunks against one process and one chunk; bad rows among the good."""
    folder, held_out = tmp_path / "rows", tmp_path / "held_out.jsonl"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [*ROWS_OF[kind][:150], {"prompt": 3}, *ROWS_OF[kind][150:]])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    common = [folder, "--kind", kind, "--tokenizer", tokenizer_file, "--shard-tokens", 5000]
    common += ["--hold-out-share", 0.1, "--hold-out-file", held_out]
    assert run(*common, "--output", tmp_path / "one", "--workers", 1) == 0
    held_out.rename(tmp_path / "first")
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 9000)
    assert run(*common, "--output", tmp_path / "two", "--workers", 2) == 0
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert held_out.read_bytes() == (tmp_path / "first").read_bytes()
    assert TokenStore.open(tmp_path / "one").manifest.skipped == {"bad_shape": 2}


# --- held out


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_held_out_rows_can_be_prepared_again(tmp_path: Path, tokenizer_file: Path, kind: StoreKind) -> None:
    """The row's own fields; what nobody looks at may be no text."""
    name = "messages" if kind == "chats" else "prompt"
    rows = [
        {**row, name: [{**message, "mood": "\ud800 😀"} for message in row[name]]} if i % 2 else row
        for i, row in enumerate(ROWS_OF[kind])
    ]
    rows_file, file = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    rows_file.write_text("".join(json.dumps({**row, "mood": "\ud800"}) + "\n" for row in rows))
    words = ["--kind", kind, "--tokenizer", tokenizer_file, "--strict"]
    hold_out = ["--hold-out-share", 0.3, "--hold-out-seed", 1, "--hold-out-file", file]
    assert run(rows_file, *words, *hold_out, "--output", tmp_path / "store") == 0
    out = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert 0.15 < len(out) / len(rows) < 0.45
    own = ("messages", "prompt", "chosen", "rejected", "tools")
    by_id = {row["id"]: row for row in rows}
    for row in out:
        assert row == {
            **{name: value for name, value in by_id[row["id"]].items() if name in own},
            **{"lang": by_id[row["id"]]["lang"], "source": str(rows_file), "id": row["id"]},
        }
    taken = {row["id"] for row in out}
    tokenizer, store = Tokenizer.load(tokenizer_file), TokenStore.open(tmp_path / "store")
    check_documents(store, [row for row in rows if row["id"] not in taken], tokenizer)
    assert store.manifest.held_out == len(out) and store.manifest.rows == len(rows)
    assert run(file, *words, "--output", tmp_path / "again") == 0
    check_documents(TokenStore.open(tmp_path / "again"), out, tokenizer)


def test_dates_among_the_messages_held_out(tmp_path: Path, tokenizer_file: Path) -> None:
    """JSON has none: they are written as text."""
    when = datetime.datetime(2025, 8, 17, 7, 45)
    rows = [{"messages": [{**row["messages"][0], "when": when}, row["messages"][1]]} for row in CHATS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = ["--kind", "chats", "--tokenizer", tokenizer_file, "--output", tmp_path / "store", "--strict"]
    words += ["--hold-out-share", 0.3, "--hold-out-file", tmp_path / "held_out.jsonl"]
    assert run(tmp_path / "rows.parquet", *words) == 0
    out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text("utf-8").splitlines()]
    assert len(out) > 50
    assert {row["messages"][0]["when"] for row in out} == {"2025-08-17 07:45:00"}


def held_out_ids(tmp_path: Path, rows: list[dict], kind: StoreKind, tokenizer_file: Path) -> set[str]:
    rows_file, file = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "held_out.jsonl"
    words = [rows_file, "--kind", kind, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words, "--hold-out-share", 0.3, "--hold-out-file", file, "--overwrite") == 0
    return {json.loads(line)["id"] for line in file.read_text("utf-8").splitlines()}


def test_pairs_of_one_prompt_are_on_one_side(tmp_path: Path, tokenizer_file: Path) -> None:
    """However the prompt is spelled. Other tools make another prompt."""
    taken = held_out_ids(tmp_path, PAIRS, "pairs", tokenizer_file)
    sides: dict[str, set[bool]] = {}
    for row in PAIRS:
        sides.setdefault(row["prompt"][0]["content"], set()).add(row["id"] in taken)
    assert len(sides) == 100 and all(len(side) == 1 for side in sides.values())
    assert {True, False} == set.union(*sides.values())
    spelled = [{**row, "prompt": f" {row['prompt'][0]['content']}\n", "chosen": "other"} for row in PAIRS]
    assert held_out_ids(tmp_path, spelled, "pairs", tokenizer_file) == taken
    with_tools = [{**row, "tools": [{"name": "f"}]} for row in PAIRS]
    assert held_out_ids(tmp_path, with_tools, "pairs", tokenizer_file) != taken


def test_copies_of_a_chat_are_on_one_side(tmp_path: Path, tokenizer_file: Path) -> None:
    taken = held_out_ids(tmp_path, CHATS, "chats", tokenizer_file)
    assert len(taken) > 50
    as_prompts = [
        {**row, "messages": None, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in CHATS
    ]
    assert held_out_ids(tmp_path, as_prompts, "chats", tokenizer_file) == taken
    other_answers = [
        {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": "x"}]} for row in CHATS
    ]
    assert held_out_ids(tmp_path, other_answers, "chats", tokenizer_file) != taken


# --- real rows


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "folder"), [("chats", "sft"), ("pairs", "dpo")])
def test_real_rows(tmp_path: Path, shared_data: Path, kind: StoreKind, folder: str) -> None:
    """All rows of real chats and pairs go in; ids and marks are those of rendering one by one."""
    tokenizer_file = shared_data / "tokenizer" / "gemma3_262k.model"
    words = [shared_data / folder, "--kind", kind, "--output", tmp_path / "store", "--strict"]
    assert run(*words, "--tokenizer", tokenizer_file) == 0
    rows = [
        json.loads(line)
        for file in sorted((shared_data / folder).glob("*.jsonl"))
        for line in file.read_text("utf-8").split("\n")
        if line
    ]
    assert len(rows) > 1000
    check_documents(TokenStore.open(tmp_path / "store"), rows, Tokenizer.load(tokenizer_file))
