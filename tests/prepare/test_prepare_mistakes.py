"""What `prepare` refuses: every mistake a line and a 2, and nothing is written."""

from __future__ import annotations

import gzip
from pathlib import Path

import fsspec
import pytest

from sealion_jax.data.preparation.encoding import HoldOut
from sealion_jax.data.store.growing_file import GrowingFile, explain_write_errors
from sealion_jax.errors import UserError
from tests.prepare.prepare_command import ROWS, run, write_rows


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


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("texts/*.jsonl", "texts/held_out.jsonl"),
        ("texts/../texts/[a-z]*", "texts/held_out.jsonl"),
        ("**/*.jsonl", "texts/held_out.jsonl"),
        ("texts/**", "texts/b/held_out.jsonl"),
        ("texts/**/*.jsonl", "texts/held_out.jsonl"),
        ("link/*.jsonl", "texts/held_out.jsonl"),
        ("texts/*.jsonl", "link/held_out.jsonl"),
        ("t*/*.jsonl", "link/held_out.jsonl"),
        ("memory://{id}/texts/*.jsonl", "memory://{id}/texts/held_out.jsonl"),
        ("memory://{id}/texts", "memory://{id}/texts/held_out.jsonl"),
        ("file://{dir}/texts/*.jsonl", "texts/held_out.jsonl"),
    ],
)
def test_what_is_written_fits_a_pattern_of_the_inputs(
    tmp_path: Path, tokenizer_file: Path, pattern: str, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"id": tmp_path.name, "dir": tmp_path}
    pattern, written = (
        name.format(**names) if "://" in name else str(tmp_path / name) for name in (pattern, written)
    )
    (tmp_path / "texts").mkdir()
    if "link" in pattern + written:
        (tmp_path / "link").symlink_to(tmp_path / "texts")
    rows_file = write_rows(tmp_path / "texts" / "a.jsonl", ROWS)
    fsspec.filesystem("memory").put(str(rows_file), f"memory://{tmp_path.name}/texts/a.jsonl")
    words = [pattern, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words, "--hold-out-share", 0.1, "--hold-out-file", written) == 2
    assert "is to be written, and" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_what_is_written_beside_a_pattern_s_files(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store's own files count too; what fits no pattern may be written."""
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "a.jsonl", ROWS)
    common = ["--tokenizer", tokenizer_file, "--output", tmp_path / "texts" / "store"]
    assert run(tmp_path / "texts" / "**" / "*.jsonl", *common) == 2
    assert "is to be written, and" in capsys.readouterr().err
    held_out = ["--hold-out-share", 0.1, "--hold-out-file", tmp_path / "texts" / "held_out.rows"]
    assert run(tmp_path / "texts" / "*.jsonl", *common, *held_out) == 0
    assert run(tmp_path / "texts" / "*.jsonl", *common, *held_out) == 0
    assert "nothing to do" in capsys.readouterr().out


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
