"""The command on chats and pairs: every row and input that cannot be used is told, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.tokenizer import Tokenizer
from tests.prepare.prepare_command import CHATS, PAIRS, ROWS, ROWS_OF, check_documents, run, write_rows
from tests.tiny_text import SENTENCES

# --- rows that cannot be used


def says(role: str, content: object, **others: object) -> dict[str, object]:
    return {"role": role, "content": content, **others}


def calling(arguments: str) -> dict[str, object]:
    return says("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


HI, HELLO = says("user", "Hi"), says("assistant", "Hello")
BAD_CHATS: dict[str, object] = {
    "bad_json": "{",
    "not_utf8": b'{"prompt": "\xff"}',
    "missing_field": {"messages": []},
    "bad_shape": {"messages": "Hi"},
    "unknown_role": {"messages": [HI, says("model", "Hello")]},
    "system_not_first": {"messages": [HI, says("system", "x")]},
    "roles_do_not_alternate": {"messages": [HI, HI, HELLO]},
    "content_not_a_string": {"messages": [HI, says("assistant", 3)]},
    "content_not_text": {"messages": [says("user", [{"type": "image_url"}])]},
    "empty_user_turn": {"messages": [says("user", " "), HELLO]},
    "empty_assistant_turn": {"messages": [HI, says("assistant", "\n")]},
    "bad_tool": {"messages": [HI, HELLO], "tools": [{}]},
    "arguments_not_json": {"messages": [HI, calling('{"a": ')]},
    "tool_result_without_call": {"messages": [HI, HELLO, says("tool", "x"), HELLO]},
    "no_assistant_turn": {"messages": [HI]},
    "lone_surrogate": {"messages": [HI, says("assistant", "\ud800")]},
    "language_not_a_string": {"messages": [HI, HELLO], "lang": ["id"]},
}
BAD_PAIRS: dict[str, object] = {
    "missing_field": {"prompt": "Hi", "chosen": "a"},
    "bad_shape": {"prompt": "Hi", "chosen": 3, "rejected": "a"},
    "roles_do_not_alternate": {"prompt": [HI, HELLO], "chosen": "a", "rejected": "b"},
    "empty_assistant_turn": {"prompt": "Hi", "chosen": " ", "rejected": "b"},
    "equal_answers": {"prompt": "Hi", "chosen": "a", "rejected": " a\n"},
}
BAD_ROWS: dict[StoreKind, dict[str, object]] = {"chats": BAD_CHATS, "pairs": BAD_PAIRS}


def with_bad_rows(path: Path, kind: StoreKind) -> Path:
    """A good row after each bad one."""
    good = json.dumps(ROWS_OF[kind][1]).encode()
    lines = []
    for row in BAD_ROWS[kind].values():
        as_text = row if isinstance(row, str | bytes) else json.dumps(row)
        lines += [as_text if isinstance(as_text, bytes) else as_text.encode(), good]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_every_reason_is_told_with_file_and_line(
    tmp_path: Path, tokenizer_file: Path, kind: StoreKind, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file, reasons = with_bad_rows(tmp_path / "rows.jsonl", kind), list(BAD_ROWS[kind])
    words = [rows_file, "--kind", kind, "--output", tmp_path / "store", "--tokenizer", tokenizer_file]
    assert run(*words, "--max-skipped-share", 0.5) == 0
    said = capsys.readouterr().out
    assert "skipped rows: " + ", ".join(f"1 {reason}" for reason in sorted(reasons)) in said
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert manifest.skipped == dict.fromkeys(sorted(reasons), 1)
    assert manifest.rows == 2 * len(reasons)
    report = (tmp_path / "store" / "skipped.jsonl").read_text("utf-8").splitlines()
    told = [json.loads(line) for line in report]
    assert [(row["file"], row["line"], row["reason"]) for row in told] == [
        (str(rows_file), 2 * i + 1, reason) for i, reason in enumerate(reasons)
    ]
    assert all(row["detail"] for row in told)
    check_documents(
        TokenStore.open(tmp_path / "store"), [ROWS_OF[kind][1]] * len(reasons), Tokenizer.load(tokenizer_file)
    )


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("chats", ["--strict"], "none is allowed by --strict; the first is {file} line 1 (bad_json: "),
        ("chats", [], "17 rows cannot be used (1 arguments_not_json, "),
        (
            "pairs",
            ["--max-skipped-share", 0.4],
            "--max-skipped-share allows 40.00% of 10; the first is {file} line 1",
        ),
        ("pairs", [], "(missing_field: no rejected)"),
    ],
)
def test_too_many_bad_rows_fail_the_command(
    tmp_path: Path,
    tokenizer_file: Path,
    kind: StoreKind,
    words: list[object],
    message: str,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows_file = with_bad_rows(tmp_path / "rows.jsonl", kind)
    words = [rows_file, "--kind", kind, "--output", tmp_path / "s", "--tokenizer", tokenizer_file, *words]
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert message.format(file=rows_file) in said and "Traceback" not in said
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (CHATS, [], "no field 'text'; for chats, add --kind chats"),
        (PAIRS, [], "no field 'text'; for pairs, add --kind pairs"),
        (PAIRS, ["--max-skipped-share", 1], "no field 'text'; for pairs, add --kind pairs"),
        ([{"prompt": "a", "completion": "b"}], [], "no field 'text'; for chats, add --kind chats"),
        ([{"body": "a"}], [], "(no_text: no field 'text')"),
        (PAIRS, ["--kind", "chats"], "no completion; for pairs, add --kind pairs"),
        (CHATS, ["--kind", "pairs"], "no prompt; for chats, add --kind chats"),
        (ROWS, ["--kind", "chats"], "expected one of them; for text, leave out --kind chats"),
        (ROWS, ["--kind", "pairs"], "no prompt; for text, leave out --kind pairs"),
        (
            CHATS,
            ["--kind", "chats", "--text-field", "a"],
            "--text-field a is for text, and --kind chats reads",
        ),
        (CHATS, ["--kind", "songs"], "--kind"),
    ],
)
def test_rows_of_another_kind(
    tmp_path: Path,
    tokenizer_file: Path,
    rows: list[dict],
    words: list[object],
    message: str,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows_file = write_rows(tmp_path / "rows.jsonl", rows[:9])
    assert run(rows_file, "--output", tmp_path / "s", "--tokenizer", tokenizer_file, *words) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_plain_text_has_no_chats(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    words = [tmp_path / "a.txt", "--kind", "chats", "--output", tmp_path / "s", "--tokenizer", tokenizer_file]
    assert run(*words) == 2
    assert "a.txt is plain text, and chats are rows with fields" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_references_count_among_what_is_written(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pattern that would find them the next time is refused, for pairs alone."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_rows(tmp_path / "a" / "b" / "rows.json", PAIRS[:9])
    words = [tmp_path / "*" / "*" / "*.json", "--tokenizer", tokenizer_file, "--output", tmp_path / "store"]
    assert run(*words, "--kind", "pairs") == 2
    assert "is to be written, and" in capsys.readouterr().err
    assert run(*words, "--kind", "chats", "--max-skipped-share", 1) == 2
    assert "no completion" in capsys.readouterr().err


def test_a_tokenizer_of_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(SENTENCES.values()), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=150,
        model_type="bpe",
        minloglevel=2,
    )
    rows_file = write_rows(tmp_path / "rows.jsonl", CHATS)
    words = [
        rows_file,
        "--kind",
        "chats",
        "--output",
        tmp_path / "s",
        "--tokenizer",
        tmp_path / "plain.model",
    ]
    assert run(*words) == 2
    assert "no control token <start_of_turn>" in capsys.readouterr().err
