"""The command's own mistakes: told in a line before any weights are looked for, and nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from etils import epath

from sealion_jax import cli, evaluate
from sealion_jax.checkpoint import weights
from sealion_jax.errors import UserError


def run(*words: object) -> int:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(evaluate.main, [str(word) for word in words])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: str) -> None:
        raise UserError("the weights were looked for")

    monkeypatch.setattr(weights, "open_weights", never)


@pytest.mark.parametrize(
    "option",
    [
        *(("--context-tokens", 0), ("--context-tokens", 1), ("--context-tokens", -5), ("--batch-size", 0)),
        *(("--max-documents", 0), ("--max-documents", -1), ("--mesh-tensor", 0)),
    ],
)
def test_numbers_that_make_no_evaluation(
    tmp_path: Path, option: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("model", "--data", "a.jsonl", "--output", tmp_path / "out.json", *option) == 2
    said = capsys.readouterr().err
    assert f"{option[0]} is {option[1]}; it must be at least" in said and said.count("\n") == 1


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for output in ("file/out.json", "file/a/b/out.json", "folder", "a/b/" + "x" * 300):
        assert run("model", "--data", "a.jsonl", "--output", tmp_path / output) == 2
        said = capsys.readouterr().err
        assert f"cannot write --output {tmp_path / output}: " in said and said.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_folder_of_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert run("model", "--data", "a.jsonl", "--output", tmp_path / "theirs" / "out.json") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_an_output_that_can_be_written_leaves_nothing_when_the_rest_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").write_text("the last one")
    for output in ("out.json", "a/b/out.json"):
        assert run("model", "--data", "a.jsonl", "--output", tmp_path / output) == 2
        assert "the weights were looked for" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "out.json"]
    assert (tmp_path / "out.json").read_text() == "the last one"


def test_a_disk_that_has_become_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = epath.Path(tmp_path / "a" / "out.json")

    def full(self: object, text: str) -> None:
        with open(os.fspath(self), "w") as file:  # pyright: ignore
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(output), "write_text", full)
        with pytest.raises(UserError, match=r"cannot write --output .*: No space left on device"):
            evaluate._write(output, "a long text of scores")
    assert list(tmp_path.iterdir()) == []
    evaluate._write(output, json.dumps({"sets": {}}))
    assert [path.name for path in output.parent.iterdir()] == ["out.json"]
    assert json.loads(output.read_text()) == {"sets": {}}


def test_sets_are_named_by_their_files() -> None:
    options = evaluate.EvaluateOptions(
        checkpoint="model", data=("x/a.jsonl", "b.jsonl.gz", "gs://c/c.jsonl.zst", "d.rows"), output="out"
    )
    assert evaluate._name_sets(options) == dict(zip(("a", "b", "c", "d.rows"), options.data, strict=True))
