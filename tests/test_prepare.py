"""The command: the same store however it was made, stopped or repeated; every mistake a line and a 2."""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sealion_jax import cli, prepare
from sealion_jax.data import preparation, text_files
from sealion_jax.data.encoding import HoldOut
from sealion_jax.data.growing_file import GrowingFile, explain_write_errors
from sealion_jax.data.preparation import PrepareOptions
from sealion_jax.data.token_store import TokenStore
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer
from tests.commands import command_environment
from tests.tiny_text import SENTENCES, tiny_tokenizer

ROWS = [
    {"text": f"{text} {i}\n" * (1 + i % 4), "lang": language, "id": f"{language}{i}"}
    for i in range(60)
    for language, text in SENTENCES.items()
]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[1]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def run(*words: object) -> int:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(prepare.main, [str(word) for word in words])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def texts_of(store: TokenStore, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(store.document(i)[1:-1]), store.language_names[store.languages[i]])
        for i in range(store.num_documents)
    ]


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


# --- stopped, repeated


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


SLOWLY = """
import sys, time
from sealion_jax import cli, prepare
from sealion_jax.data import encoding, preparation, text_files
text_files.CHUNK_BYTES = 2000
encode = encoding.encode
def slowly(*args, **kwargs):
    time.sleep(0.05)
    return encode(*args, **kwargs)
encoding.encode = slowly
options = prepare.prepare_options
def often(given):
    import dataclasses
    return dataclasses.replace(options(given), commit_seconds=0.0)
prepare.prepare_options = often
cli.run(prepare.main)
"""


def test_killed_and_run_again(tmp_path: Path, tokenizer_file: Path) -> None:
    """SIGKILL twice, once in each of two files; then it finishes: every byte as if undisturbed."""
    held_out = tmp_path / "held_out.jsonl"
    files = [write_rows(tmp_path / f"{i}.jsonl", ROWS[100 * i : 100 * i + 100]) for i in range(3)]
    words = [*map(str, files), "--tokenizer", str(tokenizer_file), "--shard-tokens", "3000", "--workers", "1"]
    words += ["--hold-out-share", "0.1", "--hold-out-file", str(held_out)]
    assert run(*words, "--output", tmp_path / "whole") == 0
    expected = held_out.read_bytes()
    held_out.unlink()
    progress = tmp_path / "killed" / "progress.json"

    def rows_done() -> int:
        return json.loads(progress.read_bytes())["counts"].get("rows", 0) if progress.exists() else 0

    for target in (40, 150):
        command = [sys.executable, "-c", SLOWLY, *words, "--output", str(tmp_path / "killed")]
        process = subprocess.Popen(command, env=command_environment(), stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda least=target: rows_done() >= least)
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert target <= rows_done() < len(ROWS)
        with pytest.raises(UserError, match="is not a finished token store"):
            TokenStore.open(tmp_path / "killed")
    before = rows_done()
    assert run(*words, "--output", tmp_path / "killed") == 0
    assert before >= 150
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
    assert held_out.read_bytes() == expected


def test_going_on_does_not_read_again_what_is_done(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 2000)
    tokenizer = Tokenizer.load(tokenizer_file)
    seen: list[int] = []
    append = preparation.StoreWriter.append

    def stops_after_five(self, encoded, *, source):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(encoded.rows)
        append(self, encoded, source=source)

    def make() -> None:
        preparation.prepare(
            [str(rows_file)],
            str(tmp_path / "store"),
            tokenizer=tokenizer,
            options=PrepareOptions(commit_seconds=0, workers=1),
            show=partial(cli.Progress, unit="B"),
        )

    with monkeypatch.context() as patched:
        patched.setattr(preparation.StoreWriter, "append", stops_after_five)
        with pytest.raises(KeyboardInterrupt):
            make()
        first, seen[:] = list(seen), []
        with pytest.raises(KeyboardInterrupt):
            make()
    make()
    store = TokenStore.open(tmp_path / "store")
    assert texts_of(store, tokenizer) == [(row["text"], row["lang"]) for row in ROWS]
    assert len(first) == len(seen) == 5


def test_again_on_a_finished_store(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    moved = rows_file.rename(tmp_path / "moved.jsonl")
    capsys.readouterr()
    assert run(moved, *words[1:]) == 0, "inputs that moved are the same inputs"
    assert "nothing to do" in capsys.readouterr().out
    assert run(moved, *words[1:], "--text-field", "id") == 2
    assert "made with other options (read)" in capsys.readouterr().err
    other_tokenizer = tmp_path / "other"
    other_tokenizer.mkdir()
    tiny_tokenizer(other_tokenizer, vocab_size=650)
    assert run(moved, *words[1:-1], other_tokenizer / "tiny.model") == 2
    assert "of another tokenizer" in capsys.readouterr().err
    write_rows(moved, ROWS[1:])
    assert run(moved, *words[1:]) == 2
    assert "of other inputs" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert run(moved, *words[1:], "--overwrite") == 0
    assert TokenStore.open(tmp_path / "store").num_documents == len(ROWS) - 1


def test_again_when_the_held_out_file_is_gone(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    words += ["--hold-out-share", 0.2, "--hold-out-file", held_out]
    held_out.write_text("somebody's\n")
    assert run(*words) == 2
    assert "is there already" in capsys.readouterr().err
    held_out.unlink()
    assert run(*words) == 0 and run(*words) == 0
    held_out.write_text("changed\n")
    assert run(*words) == 2
    assert "not the file of held-out documents" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0
    assert held_out.read_text("utf-8").count("\n") == TokenStore.open(tmp_path / "store").manifest.held_out


def test_a_damaged_store_is_not_taken_for_finished(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words) == 0
    (tmp_path / "store" / "offsets.bin").write_bytes(b"1234")
    assert run(*words) == 2
    assert "offsets.bin has 4 bytes" in capsys.readouterr().err


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


def test_no_document_at_all(tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("empty.jsonl", ""), ("bad.jsonl", "{\n")):
        (tmp_path / name).write_text(content)
        words = [tmp_path / name, "--output", tmp_path / f"{name}.store", "--tokenizer", tokenizer_file]
        assert run(*words, "--max-skipped-share", 1) == 2
        assert "no document for" in capsys.readouterr().err
        assert not (tmp_path / f"{name}.store" / "manifest.json").exists()


# --- other mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{rows}", "--tokenizer", "{tokenizer}"], "output"),
        (["--output", "{dir}/s", "--tokenizer", "{tokenizer}"], "no input"),
        (["{rows}", "--output", "{dir}/s", "--tokenizer", "{dir}/none.model"], "no tokenizer at"),
        (["{dir}/none.jsonl", "--output", "{dir}/s", "--tokenizer", "{tokenizer}"], "no input there"),
        (
            ["{rows}", "--output", "{dir}/s", "--tokenizer", "{tokenizer}", "--hold-out-share", "0.1"],
            "go together",
        ),
        (["{rows}", "--output", "{dir}/s", "--tokenizer", "{tokenizer}", "--workers", "0"], "workers is 0"),
        (
            ["{rows}", "--output", "{dir}/s", "--tokenizer", "{tokenizer}", "--max-skipped-share", "2"],
            "a share",
        ),
        (
            ["{rows}", "--output", "{dir}/s", "--tokenizer", "{tokenizer}", "--shard-tokens", "0"],
            "at least 1",
        ),
        (["{rows}", "--output", "{dir}/s", "--tokenizer", "{tokenizer}", "--txt-field", "a"], "--text-field"),
        (["{rows}", "--output", "{tokenizer}/s", "--tokenizer", "{tokenizer}"], "cannot write"),
    ],
)
def test_mistakes_are_a_line_and_exit_code_2(
    tmp_path: Path, tokenizer_file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = write_rows(tmp_path / "rows.jsonl", ROWS[:9])
    names = {"rows": rows_file, "tokenizer": tokenizer_file, "dir": tmp_path}
    assert run(*(word.format(**names) for word in words)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("output", ["rows.jsonl", "texts/store", "texts/../texts/a/b"])
def test_an_output_among_the_inputs(
    tmp_path: Path, tokenizer_file: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    inputs = [write_rows(tmp_path / name, ROWS[:9]) for name in ("rows.jsonl", "texts/a.jsonl")]
    before = [path.read_bytes() for path in inputs]
    words = [inputs[0], tmp_path / "texts", "--tokenizer", tokenizer_file, "--overwrite"]
    assert run(*words, "--output", tmp_path / output) == 2
    assert "is to be written, and" in capsys.readouterr().err
    elsewhere = ["--output", tmp_path / "store", "--hold-out-share", 0.1, "--hold-out-file"]
    assert run(*words, *elsewhere, tmp_path / output) == 2
    assert "is to be written, and" in capsys.readouterr().err
    assert run(*words, *elsewhere, tmp_path / "store" / "held_out.jsonl") == 2
    assert "cannot go into the store" in capsys.readouterr().err
    assert before == [path.read_bytes() for path in inputs]
    assert not (tmp_path / "store").exists()


def test_a_share_to_hold_out_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        HoldOut(share=1.0, file="x")


def test_a_broken_input_leaves_no_store(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = gzip.compress(rows_file.read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    words = [tmp_path / "rows.jsonl.gz", "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words) == 2
    assert "cannot be read to its end" in capsys.readouterr().err
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_full_disk(
    tmp_path: Path,
    rows_file: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]

    def full(self: GrowingFile) -> None:
        with explain_write_errors(self.path):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(GrowingFile, "sync", full)
        assert run(*words) == 2
    assert "No space left on device; make room" in capsys.readouterr().err
    assert run(*words) == 0


# --- a bucket as output


def test_a_store_in_a_bucket(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fsspec's in-memory file system stands for gs://."""
    bucket = f"memory://{uuid.uuid4().hex}/store"
    words = [rows_file, "--tokenizer", tokenizer_file, "--shard-tokens", 5000, "--workers", 1]
    assert run(*words, "--output", tmp_path / "local") == 0
    assert run(*words, "--output", bucket, "--work-dir", tmp_path / "work") == 0
    assert not (tmp_path / "work").exists()
    there = TokenStore.open(bucket, cache=tmp_path / "cache")
    here = TokenStore.open(tmp_path / "local")
    assert there.manifest == here.manifest and there.verify() == []
    capsys.readouterr()
    assert run(*words, "--output", bucket) == 0
    assert "nothing to do" in capsys.readouterr().out
    write_rows(rows_file, ROWS[:9])
    assert run(*words, "--output", bucket) == 2
    assert run(*words, "--output", bucket, "--work-dir", tmp_path / "work", "--overwrite") == 0
    assert TokenStore.open(bucket, cache=tmp_path / "cache").num_documents == 9
    system, folder = fsspec.core.url_to_fs(bucket)
    shards = [path for path in system.ls(folder, detail=False) if "tokens-" in path]
    assert len(shards) == 1, "nothing of the larger store is left"
