"""Rows and texts as the tokens that a model is asked with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sealion_jax.data.chat.conversation import RowError
from sealion_jax.data.inputs.rows import Record, Skipped
from sealion_jax.errors import UserError
from sealion_jax.generation.prompts import Asking, prompt_ids, questions, read_rows, text_prompt_ids
from sealion_jax.tokenizer import Tokenizer, train_tokenizer

TEXT = "user model you are a duck who is it that quacks? quack, quack! Will it rain? Yes. No. b < o > s"
HI = {"role": "user", "content": "who is it?"}
QUACK = {"role": "assistant", "content": "quack"}
CHAT, RAW = Asking(format="chat"), Asking(format="raw")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([TEXT], vocab_size=560, path=path)


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.pieces(ids)).replace("\u2581", " ")


@pytest.mark.parametrize(
    ("fields", "asking", "expected"),
    [
        (
            {"prompt": " who is it? "},
            CHAT,
            "<bos><start_of_turn>user\nwho is it?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            {"messages": [HI]},
            Asking(format="chat", system=" you are a duck "),
            "<bos><start_of_turn>user\nyou are a duck\n\nwho is it?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            {"messages": [{"role": "system", "content": "No."}, HI]},
            Asking(format="chat", system="you are a duck"),
            "<bos><start_of_turn>user\nNo.\n\nwho is it?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            {"messages": [HI, QUACK, HI, QUACK]},
            Asking(format="chat", drop_last_answer=True),
            "<bos><start_of_turn>user\nwho is it?<end_of_turn>\n<start_of_turn>model\nquack<end_of_turn>\n"
            "<start_of_turn>user\nwho is it?<end_of_turn>\n<start_of_turn>model\n",
        ),
        ({"prompt": " who is ", "messages": [HI]}, RAW, "<bos> who is "),
        ({"prompt": "<bos>"}, RAW, "<bos><bos>"),
    ],
)
def test_a_row_in_tokens(fields: dict[str, Any], asking: Asking, expected: str, tokenizer: Tokenizer) -> None:
    ids = prompt_ids(fields, tokenizer, asking)
    assert spelled(ids, tokenizer) == expected
    # What a text spells is never a control token: only our own <bos> is one here.
    assert ids.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(
    ("fields", "asking", "reason"),
    [
        ({"messages": [HI, QUACK]}, CHAT, "roles_do_not_alternate"),
        ({"messages": [QUACK]}, Asking(format="chat", drop_last_answer=True), "missing_field"),
        ({"prompt": " "}, CHAT, "empty_user_turn"),
        ({"text": "who"}, CHAT, "missing_field"),
        ({"prompt": [HI]}, RAW, "bad_shape"),
        ({"prompt": "\ud83d"}, RAW, "lone_surrogate"),
    ],
)
def test_a_row_that_cannot_be_asked(
    fields: dict[str, Any], asking: Asking, reason: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(RowError) as refused:
        prompt_ids(fields, tokenizer, asking)
    assert refused.value.reason == reason


def test_a_text_is_asked_as_the_row_with_that_prompt(tokenizer: Tokenizer) -> None:
    for asking in (RAW, CHAT, Asking(format="chat", system="you are a duck")):
        expected = prompt_ids({"prompt": "who is it?"}, tokenizer, asking)
        assert text_prompt_ids("who is it?", tokenizer, asking) == expected


def test_what_only_a_chat_has_is_refused_for_raw_texts() -> None:
    for options in ({"system": "you are a duck"}, {"drop_last_answer": True}):
        with pytest.raises(UserError, match="choose the format chat"):
            Asking(format="raw", **options)


def test_rows_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Lines count from 1, blank ones too; what cannot be used is told, the others keep their numbers."""
    lines = ['{"prompt": "who?"}', "", "{torn", '{"messages": [{"role": "dog", "content": "woof"}]}']
    content = "\n".join([*lines, json.dumps({"messages": [HI], "id": 7})]) + "\n"
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    rows = list(read_rows(str(tmp_path / "rows.jsonl.gz")))
    assert [(type(row), row.line) for row in rows] == [(Record, 1), (Skipped, 3), (Record, 4), (Record, 5)]

    told: list[str] = []
    limits = {"max_new_tokens": 10, "max_context_tokens": 100}
    found = questions(rows, tokenizer, CHAT, source="rows:", tell=told.append, **limits)
    assert [(question.number, question.fields.get("id")) for question in found] == [(0, None), (4, 7)]
    assert [line.split(": ")[:2] for line in told] == [
        ["rows:3", "skipped, bad_json"],
        ["rows:4", "skipped, unknown_role"],
    ]
    longest = max(len(question.ids) for question in found)
    told.clear()
    short = {"max_new_tokens": 10, "max_context_tokens": longest + 9}
    fitting = questions([rows[0], rows[3]], tokenizer, CHAT, source="rows:", tell=told.append, **short)
    assert [question.number for question in fitting] == [0]
    (line,) = told
    assert line.startswith(
        f"rows:5: skipped, too_long: its {longest} tokens and --max-new-tokens 10 are more"
    )
    with pytest.raises(UserError, match="rows: there is nothing that can be answered"):
        questions(rows[1:3], tokenizer, CHAT, source="rows:", tell=told.append, **limits)
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.jsonl"):
        list(read_rows(str(tmp_path / "nowhere.jsonl")))
