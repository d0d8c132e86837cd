"""`prepare` stopped, repeated and told to overwrite: the bytes of an undisturbed run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from sealion_jax import cli
from sealion_jax.data.inputs import text_files
from sealion_jax.data.preparation import prepare as preparation
from sealion_jax.data.preparation.prepare import PrepareOptions
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import StoreWriter
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer
from tests.commands import command_environment
from tests.prepare.prepare_command import ROWS, ROWS_OF, content_of, run, texts_of, write_rows
from tests.tiny_text import tiny_tokenizer

# --- stopped, repeated


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


SLOWLY = """
import dataclasses, sys, time
from sealion_jax import cli, prepare
from sealion_jax.data.inputs import text_files
from sealion_jax.data.store import writer as store_writer
text_files.CHUNK_BYTES = 2000
append = store_writer.StoreWriter.append
def slowly(*args, **kwargs):
    time.sleep(0.05)
    return append(*args, **kwargs)
store_writer.StoreWriter.append = slowly
options = prepare.prepare_options
prepare.prepare_options = lambda given: dataclasses.replace(options(given), commit_seconds=0.0)
cli.run(prepare.main)
"""

DIES_WITH_THE_MANIFEST = """
import os
from sealion_jax import cli, prepare
from sealion_jax.data.store import writer as store_writer
write = store_writer.StoreWriter._write
def write_and_die(self, name, text):
    write(self, name, text)
    if name == "manifest.json":
        os.kill(os.getpid(), 9)
store_writer.StoreWriter._write = write_and_die
cli.run(prepare.main)
"""


@pytest.mark.parametrize(("kind", "workers", "kills"), [("text", 1, (40, 150)), ("pairs", 2, (90,))])
def test_killed_and_run_again(
    tmp_path: Path,
    tokenizer_file: Path,
    kind: StoreKind,
    workers: int,
    kills: tuple[int, ...],
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGKILL in several of the files, then when the manifest is just there: every byte as if undisturbed."""
    held_out, killed = tmp_path / "held_out.jsonl", tmp_path / "killed"
    rows = ROWS_OF[kind]
    files = [write_rows(tmp_path / f"{i}.jsonl", rows[100 * i : 100 * i + 100]) for i in range(3)]
    words = [*map(str, files), "--kind", kind, "--tokenizer", str(tokenizer_file), "--shard-tokens", "3000"]
    words += ["--hold-out-share", "0.1", "--hold-out-file", str(held_out)]
    assert run(*words, "--output", tmp_path / "whole") == 0
    expected = held_out.read_bytes()
    held_out.unlink()
    words += ["--workers", str(workers), "--output", str(killed)]
    progress = killed / "progress.json"

    def rows_done() -> int:
        return json.loads(progress.read_bytes())["counts"].get("rows", 0) if progress.exists() else 0

    def start(script: str) -> subprocess.Popen:
        command = [sys.executable, "-c", script, *words]
        return subprocess.Popen(command, env=command_environment(), stderr=subprocess.DEVNULL)

    for target in kills:
        process = start(SLOWLY)
        try:
            wait_for(lambda least=target: rows_done() >= least)
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert target <= rows_done() < len(rows)
        with pytest.raises(UserError, match="is not a finished token store"):
            TokenStore.open(killed)
    before = rows_done()
    assert start(DIES_WITH_THE_MANIFEST).wait() == -signal.SIGKILL
    assert before >= kills[-1]
    assert {".lock", "progress.json", "held_out.jsonl", "manifest.json"} <= content_of(killed).keys()
    capsys.readouterr()
    assert run(*words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert content_of(killed) == content_of(tmp_path / "whole")
    assert held_out.read_bytes() == expected


def stop_after_the_manifest(patched: pytest.MonkeyPatch) -> None:
    """From now on Ctrl-C comes right after the manifest."""
    write = StoreWriter._write

    def write_and_stop(self: StoreWriter, name: str, text: str) -> None:
        write(self, name, text)
        if name == "manifest.json":
            raise KeyboardInterrupt

    patched.setattr(StoreWriter, "_write", write_and_stop)


def test_stopped_after_the_manifest(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard is exactly full, so an empty one is open; the documents held out have been lost."""
    store, held_out = tmp_path / "store", tmp_path / "held_out.jsonl"
    words = [rows_file, "--output", store, "--tokenizer", tokenizer_file]
    words += ["--hold-out-share", 0.2, "--hold-out-file", held_out]
    assert run(*words) == 0
    words += ["--shard-tokens", TokenStore.open(store).num_tokens]
    assert run(*words, "--overwrite") == 0
    whole, texts = content_of(store), held_out.read_bytes()
    with monkeypatch.context() as patched:
        stop_after_the_manifest(patched)
        assert run(*words, "--overwrite") == cli.EXIT_INTERRUPTED
    assert set(content_of(store)) - set(whole) == {
        ".lock",
        "progress.json",
        "held_out.jsonl",
        "tokens-00001.bin",
    }
    held_out.write_text("somebody's\n")
    assert run(*words) == 2
    assert held_out.read_text() == "somebody's\n" and (store / "held_out.jsonl").read_bytes() == texts
    held_out.unlink()
    assert run(*words) == 0
    assert held_out.read_bytes() == texts
    assert content_of(store) == whole


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
