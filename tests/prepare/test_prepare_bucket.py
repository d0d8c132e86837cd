"""`prepare` into a bucket, stopped, repeated and told to overwrite."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from sealion_jax import cli
from sealion_jax.data.preparation import prepare as preparation
from sealion_jax.data.store import remote as remote_store
from sealion_jax.data.store.cache import CacheConfig
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import StoreWriter
from tests.prepare.prepare_command import ROWS, content_of, run, write_rows


def test_a_store_in_a_bucket(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fsspec's in-memory file system stands for gs://."""
    bucket = f"memory://{uuid.uuid4().hex}/store"
    words = [rows_file, "--tokenizer", tokenizer_file, "--shard-tokens", 5000, "--workers", 1]
    assert run(*words, "--output", tmp_path / "local") == 0
    assert run(*words, "--output", bucket, "--work-dir", tmp_path / "work") == 0
    assert not (tmp_path / "work").exists()
    there = TokenStore.open(bucket, cache=CacheConfig(folder=str(tmp_path / "cache")))
    here = TokenStore.open(tmp_path / "local")
    assert there.manifest == here.manifest and there.verify() == []
    capsys.readouterr()
    assert run(*words, "--output", bucket) == 0
    assert "nothing to do" in capsys.readouterr().out
    write_rows(rows_file, ROWS[:9])
    assert run(*words, "--output", bucket) == 2
    assert run(*words, "--output", bucket, "--work-dir", tmp_path / "work", "--overwrite") == 0
    assert TokenStore.open(bucket, cache=CacheConfig(folder=str(tmp_path / "cache"))).num_documents == 9
    system, folder = fsspec.core.url_to_fs(bucket)
    shards = [path for path in system.ls(folder, detail=False) if "tokens-" in path]
    assert len(shards) == 1, "nothing of the larger store is left"


def bucket_words(tmp_path: Path, tokenizer_file: Path) -> tuple[str, list[object]]:
    bucket = f"memory://{uuid.uuid4().hex}/store"
    rows_file = write_rows(tmp_path / "rows.jsonl", ROWS)
    words = [rows_file, "--tokenizer", tokenizer_file, "--output", bucket, "--work-dir", tmp_path / "work"]
    return bucket, [*words, "--workers", 1]


@pytest.mark.parametrize("stopped", ["while tokenizing", "before the upload"])
def test_overwriting_what_is_unfinished_here_and_in_a_bucket(
    tmp_path: Path,
    tokenizer_file: Path,
    stopped: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket, words = bucket_words(tmp_path, tokenizer_file)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            *((StoreWriter, "finish") if stopped == "while tokenizing" else (preparation, "upload")), stop
        )
        assert run(*words) == cli.EXIT_INTERRUPTED
    write_rows(tmp_path / "rows.jsonl", ROWS[:9])
    assert run(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0
    assert TokenStore.open(bucket, cache=CacheConfig(folder=str(tmp_path / "cache"))).num_documents == 9
    assert not (tmp_path / "work").exists()


def test_stopped_after_the_upload(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, words = bucket_words(tmp_path, tokenizer_file)

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(remote_store, "discard", stop)
        assert run(*words) == cli.EXIT_INTERRUPTED
    assert (tmp_path / "work" / "manifest.json").exists()
    assert run(*words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    assert TokenStore.open(bucket, cache=CacheConfig(folder=str(tmp_path / "cache"))).verify() == []


def test_overwriting_keeps_a_store_that_cannot_be_made_again(
    tmp_path: Path, rows_file: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's file is in the folder, or in that where a bucket's store is put together."""
    words = [rows_file, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words) == 0
    (tmp_path / "store" / "thesis.tex").write_text("...")
    before = content_of(tmp_path / "store")
    assert run(*words, "--overwrite") == 2
    assert "has other files in it (thesis.tex)" in capsys.readouterr().err
    assert content_of(tmp_path / "store") == before
    bucket, words = bucket_words(tmp_path, tokenizer_file)
    assert run(*words) == 0
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("...")
    assert run(*words, "--overwrite") == 2
    assert "has other files in it (thesis.tex)" in capsys.readouterr().err
    assert TokenStore.open(bucket, cache=CacheConfig(folder=str(tmp_path / "cache"))).verify() == []
