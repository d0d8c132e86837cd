"""The command: a store of every document, rows that cannot be used; every mistake a line and a 2."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sealion_jax.data.inputs import text_files
from sealion_jax.data.preparation.encoding import HoldOut
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.tokenizer import Tokenizer
from tests.prepare.prepare_command import ROWS, content_of, run, texts_of, write_rows
from tests.tiny_text import SENTENCES

# --- what it makes


def test_a_store_of_every_document_in_order(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file) == 0
    tokenizer, store = Tokenizer.load(tokenizer_file), TokenStore.open(tmp_path / "store")
    assert texts_of(store, tokenizer) == [(row["text"], row["lang"]) for row in ROWS]
    assert store.manifest.sources[0].sha256 == hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert store.origin(17) == (str(rows_file), 18)
    store.require_tokenizer(tokenizer.fingerprint)
    assert (store.manifest.rows, store.manifest.skipped, store.manifest.held_out) == (len(ROWS), {}, 0)
    said = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    for language in SENTENCES:
        mine = [row["text"] for row in ROWS if row["lang"] == language]
        tokens = sum(len(tokenizer.encode(text)) for text in mine)
        size = sum(len(text.encode()) for text in mine)
        expected = [f"{len(mine):,}", f"{tokens + 2 * len(mine):,}", f"{size:,}", f"{size / tokens:.2f}"]
        assert table[language] == expected
    assert table["all"][0] == f"{len(ROWS):,}"
    assert "sealion_jax.preview" in said


def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes and many small chunks against one process and one chunk; several formats at once."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "c.parquet")
    (folder / "d.txt").write_text("One whole file.\n")
    common = [
        "--tokenizer",
        tokenizer_file,
        "--shard-tokens",
        5000,
        "--hold-out-share",
        0.1,
        "--hold-out-file",
    ]
    held_out = tmp_path / "held_out.jsonl"
    assert run(folder, "--output", tmp_path / "one", "--workers", 1, *common, held_out) == 0
    held_out.rename(tmp_path / "first")
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 3000)
    assert run(folder, "--output", tmp_path / "two", "--workers", 2, *common, held_out) == 0
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert held_out.read_bytes() == (tmp_path / "first").read_bytes()
    assert TokenStore.open(tmp_path / "one").num_documents > 2.5 * len(ROWS)


def test_held_out_documents_go_to_their_file_and_not_to_the_store(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path
) -> None:
    common = [rows_file, "--tokenizer", tokenizer_file, "--hold-out-share", 0.2]
    sides: dict[int, set[str]] = {}
    for seed in (0, 1):
        store, file = tmp_path / f"store{seed}", tmp_path / f"held_out{seed}.jsonl"
        assert run(*common, "--output", store, "--hold-out-file", file, "--hold-out-seed", seed) == 0
        out = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        kept = [text for text, _ in texts_of(TokenStore.open(store), Tokenizer.load(tokenizer_file))]
        sides[seed] = {row["text"] for row in out}
        assert kept == [row["text"] for row in ROWS if row["text"] not in sides[seed]]
        assert [(row["text"], row["lang"], row["id"]) for row in out] == [
            (row["text"], row["lang"], row["id"]) for row in ROWS if row["text"] in sides[seed]
        ]
        assert {row["source"] for row in out} == {str(rows_file)}
        assert TokenStore.open(store).manifest.held_out == len(out)
        assert 0.1 < len(out) / len(ROWS) < 0.3
    assert sides[0] != sides[1]


def test_the_share_held_out_is_the_share_asked_for() -> None:
    taken = [HoldOut(share=0.02, file="x", seed=3).takes(f"document {i}") for i in range(20_000)]
    assert abs(np.mean(taken) - 0.02) < 4 * np.sqrt(0.02 * 0.98 / 20_000)
    more = [HoldOut(share=0.05, file="x", seed=3).takes(f"document {i}") for i in range(20_000)]
    assert all(b for a, b in zip(taken, more, strict=True) if a), "a larger share holds out these and others"


# --- rows that cannot be used


def with_bad_rows(path: Path, *, good: int, bad: int) -> Path:
    rows = [json.dumps({"text": f"good {i}"}) for i in range(good)]
    for i in range(bad):
        rows.insert(3 + 5 * i, ["{", '{"text": ""}', '{"body": 1}'][i % 3])
    path.write_text("\n".join(rows))
    return path


def test_skipped_rows_are_counted_and_reported(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = with_bad_rows(tmp_path / "rows.jsonl", good=396, bad=4)
    assert run(rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file) == 0
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert manifest.skipped == {"bad_json": 2, "empty": 1, "no_text": 1}
    assert (manifest.rows, manifest.documents) == (400, 396)
    assert [(source.rows, source.documents) for source in manifest.sources] == [(400, 396)]
    report = [json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in report] == [
        (str(rows_file), 4 + 5 * i, reason)
        for i, reason in enumerate(("bad_json", "empty", "no_text", "bad_json"))
    ]
    assert "skipped rows: 2 bad_json, 1 empty, 1 no_text" in capsys.readouterr().out


@pytest.mark.parametrize(("bad", "share", "code"), [(4, 0.01, 0), (5, 0.01, 2), (5, 0.013, 0), (1, 0, 2)])
def test_the_share_of_skipped_rows_decides(
    tmp_path: Path, tokenizer_file: Path, bad: int, share: float, code: int
) -> None:
    rows_file = with_bad_rows(tmp_path / "rows.jsonl", good=400 - bad, bad=bad)
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words, "--max-skipped-share", share) == code
    assert (tmp_path / "store" / "manifest.json").exists() == (code == 0)


def test_too_many_skipped_rows_then_more_allowed(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = with_bad_rows(tmp_path / "rows.jsonl", good=90, bad=10)
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert "10 rows cannot be used (4 bad_json, 3 empty, 3 no_text)" in said
    assert f"the first is {rows_file} line 4 (bad_json" in said and "skipped.jsonl" in said
    assert len((tmp_path / "store" / "skipped.jsonl").read_text().splitlines()) == 10
    assert "Traceback" not in said and not (tmp_path / "store" / "manifest.json").exists()
    assert run(*words, "--max-skipped-share", 0.1) == 0
    assert TokenStore.open(tmp_path / "store").verify() == []


def test_strict_allows_none(tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file = with_bad_rows(tmp_path / "rows.jsonl", good=500, bad=1)
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file, "--strict"]
    assert run(*words) == 2
    assert "none is allowed by --strict" in capsys.readouterr().err
    assert not (tmp_path / "store" / "manifest.json").exists()
    with_bad_rows(rows_file, good=500, bad=0)
    assert run(*words) == 0, "the mended file takes the place of what was not committed"


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"  \t\n\n\n"])
def test_blank_lines_are_no_rows(tmp_path: Path, tokenizer_file: Path, blank: bytes) -> None:
    rows_file = with_bad_rows(tmp_path / "rows.jsonl", good=3, bad=0)
    rows_file.write_bytes(blank + rows_file.read_bytes() + b"\n" + blank)
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file, "--strict"]
    assert run(*words) == 0
    store = TokenStore.open(tmp_path / "store")
    assert (store.manifest.rows, store.manifest.skipped) == (3, {})
    assert store.origin(0) == (str(rows_file), 1 + blank.count(b"\n")), "the line's number counts them"


@pytest.mark.parametrize(("languages", "chunk_bytes"), [(70_000, 1 << 22), (1001, 5000)])
def test_a_language_field_that_is_none(
    tmp_path: Path,
    tokenizer_file: Path,
    languages: int,
    chunk_bytes: int,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """More in one piece of work than its index can number, and a few too many over all pieces."""
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    rows_file = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "n": f"{i}"} for i in range(languages)])
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file, "--workers", 1]
    assert run(*words, "--language-field", "n") == 2
    said = capsys.readouterr().err
    assert "more than 1,000 languages; is the language field the right one?" in said
    assert "Traceback" not in said
    write_rows(rows_file, [{"text": "a", "n": f"{i}"} for i in range(1000)])
    assert run(*words, "--language-field", "n", "--overwrite") == 0
    assert len(TokenStore.open(tmp_path / "store").language_names) == 1000


def test_what_a_folder_has_besides_documents_is_told(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "a.jsonl", ROWS[:9])
    for name in ("README.md", "dataset_info.json", "notes.pdf", "z.csv", ".cache.jsonl"):
        (tmp_path / "texts" / name).write_text("{}")
    words = [tmp_path / "texts", "--output", tmp_path / "store", "--tokenizer", tokenizer_file, "--strict"]
    assert run(*words) == 0
    said = capsys.readouterr().err
    expected = f"files passed over in {tmp_path / 'texts'}: 4 (README.md, dataset_info.json, notes.pdf, ...)"
    assert expected in said.splitlines()
    assert TokenStore.open(tmp_path / "store").num_documents == 9


def test_no_document_at_all(tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("empty.jsonl", ""), ("bad.jsonl", "{\n")):
        (tmp_path / name).write_text(content)
        words = [tmp_path / name, "--output", tmp_path / f"{name}.store", "--tokenizer", tokenizer_file]
        assert run(*words, "--max-skipped-share", 1) == 2
        assert "no document for" in capsys.readouterr().err
        assert not (tmp_path / f"{name}.store" / "manifest.json").exists()
