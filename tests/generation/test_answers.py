"""Answers as rows, and the file that is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sealion_jax.data.chat.conversation import AssistantTurn, ToolCall
from sealion_jax.data.chat.format import assistant_text
from sealion_jax.data.chat.rows import chat_from_fields
from sealion_jax.errors import UserError
from sealion_jax.generation.answers import AnswersFile, answer_fields, title, told
from sealion_jax.generation.generator import Completion
from sealion_jax.tokenizer import Tokenizer, train_tokenizer

CALLS = AssistantTurn(
    text="Let me look.",
    calls=(ToolCall(name="weather", arguments='{"city": "Johor"}'), ToolCall(name="now", arguments="{}")),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([assistant_text(CALLS)], vocab_size=556, path=path)


def test_an_answer_in_fields(tokenizer: Tokenizer) -> None:
    eos, end = tokenizer.eos_id, tokenizer.end_of_turn_id
    look = tokenizer.encode(" Let me look. ")
    chat = answer_fields(Completion(ids=(*look, end), stopped="end"), tokenizer, "chat")
    assert chat == {"answer": "Let me look.", "tokens": len(look) + 1, "stopped": "end_of_turn"}
    raw = answer_fields(Completion(ids=(*look, eos), stopped="end"), tokenizer, "raw")
    assert raw == {"answer": " Let me look. ", "tokens": len(look) + 1, "stopped": "eos"}
    cut = answer_fields(Completion(ids=tuple(look), stopped="length"), tokenizer, "raw")
    assert cut == {"answer": " Let me look. ", "tokens": len(look), "stopped": "length"}
    blank = answer_fields(Completion(ids=(end,), stopped="end"), tokenizer, "chat")
    assert blank == {"answer": "", "tokens": 1, "stopped": "end_of_turn"}


def test_calls_are_those_of_a_message(tokenizer: Tokenizer) -> None:
    """Put into a row as the assistant's message, the answer is the turn that it was read from."""
    ids = (*tokenizer.encode(assistant_text(CALLS)), tokenizer.end_of_turn_id)
    fields = answer_fields(Completion(ids=ids, stopped="end"), tokenizer, "chat")
    message = {"role": "assistant", "content": fields["answer"], "tool_calls": fields["tool_calls"]}
    row = {"messages": [{"role": "user", "content": "Will it rain?"}, message]}
    assert chat_from_fields(row).turns[1] == CALLS
    assert told(fields).split("\n") == [
        "Let me look.",
        '{"name": "weather", "arguments": {"city": "Johor"}}',
        '{"name": "now", "arguments": {}}',
    ]


def test_the_title_of_a_row() -> None:
    assert title({"prompt": "Who?"}) == "Who?"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    assert title({"messages": messages}) == "Who?"


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_gone_on_with_after_its_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    answers = AnswersFile(path, {"seed": 0}, overwrite=False)
    answers.append([{"n": 0, "answer": "ខ្មែរ"}, {"n": 1, "half": "\ud83d"}])
    assert [row["n"] for row in written(path)] == [0, 1]  # there before the file is closed
    answers.close()
    with path.open("a") as file:
        file.write('{"n": 2, "ans')
    again = AnswersFile(path, {"seed": 0}, overwrite=False)
    assert again.count == 2
    again.append([{"n": 2}])
    again.close()
    assert [row["n"] for row in written(path)] == [0, 1, 2]
    assert written(path)[:2] == [{"n": 0, "answer": "ខ្មែរ"}, {"n": 1, "half": "\ud83d"}]
    assert "ខ្មែរ" in path.read_text()


def test_other_options_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answers = AnswersFile(path, {"seed": 0, "temperature": 1.0}, overwrite=False)
    answers.append([{"n": 0}])
    answers.close()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"seed was 0, now 1; top_k was None, now 5.*--overwrite"):
        AnswersFile(path, {"seed": 1, "temperature": 1.0, "top_k": 5}, overwrite=False)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    anew = AnswersFile(path, {"seed": 1}, overwrite=True)
    assert anew.count == 0
    anew.close()
    assert json.loads((tmp_path / "out.jsonl.options.json").read_text()) == {"seed": 1}


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": []}\n')
    for record in (None, "{torn", "[]"):
        if record is not None:
            (tmp_path / "chats.jsonl.options.json").write_text(record)
        with pytest.raises(UserError, match=r"no chats\.jsonl\.options\.json that says what made it"):
            AnswersFile(path, {"seed": 0}, overwrite=False)
    assert path.read_text() == '{"messages": []}\n'


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write --output .*file/out\.jsonl: "):
        AnswersFile(tmp_path / "file" / "out.jsonl", {}, overwrite=False)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write --output|no folder\.options\.json"):
        AnswersFile(tmp_path / "folder", {}, overwrite=False)
