"""Held-out files of every kind: what a row becomes, which are refused and how; windows of a conversation."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from sealion_jax.data.chat.rendering import render_chat
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.errors import UserError
from sealion_jax.evaluation.documents import read_held_out
from sealion_jax.evaluation.windows import cut
from sealion_jax.tokenizer import Tokenizer
from tests.evaluation.conversations import (
    CHATS,
    PAIRS,
    assistant_spans,
    given_turns,
    said,
    said_bytes,
)
from tests.tiny_text import tiny_tokenizer

CHAT = {"messages": said("Hi", "Ya")}
PAIR = {"prompt": "Hi", "chosen": "Ya", "rejected": "No"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
WRITTEN_ALIKE = {"chosen": '{"name": "f", "parameters": {}}', "rejected": [CALL]}
TEXT = {"text": "satu"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


def lines(rows: Sequence[Mapping[str, Any] | str]) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_chats_and_what_is_scored_of_them(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    packers = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    content = "\ufeff\n\n" + lines([row for row, _ in CHATS]).replace("\n", "\r\n\r\n")
    path = tmp_path / f"chats.jsonl{suffix}"
    path.write_bytes(packers[suffix](content.encode()))
    kind, documents = read_held_out(str(path), tokenizer)
    assert kind == "chats" and len(documents) == len(CHATS)
    for n, (document, (row, given)) in enumerate(zip(documents, CHATS, strict=True)):
        np.testing.assert_array_equal(document.tokens, render_chat(chat_from_fields(row), tokenizer).ids)
        spans = assistant_spans(document.tokens, tokenizer)[given:]
        scored = [place for span in spans for place in span]
        assert np.flatnonzero(document.scored).tolist() == scored
        assert document.num_bytes == said_bytes(document.tokens, spans, tokenizer)
        assert document.language == row.get("lang", "und")
        assert document.id == row.get("id", str(3 + 2 * n))


def test_pairs_are_two_documents_each(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines(PAIRS))
    kind, documents = read_held_out(str(tmp_path / "pairs.jsonl"), tokenizer)
    assert kind == "pairs" and len(documents) == 2 * len(PAIRS)
    for n, row in enumerate(PAIRS):
        pair = preference_from_fields(row)
        for document, side in zip(documents[2 * n : 2 * n + 2], (pair.chosen, pair.rejected), strict=True):
            np.testing.assert_array_equal(document.tokens, render_chat(side, tokenizer).ids)
            (span,) = assistant_spans(document.tokens, tokenizer)[given_turns(row) :]
            assert np.flatnonzero(document.scored).tolist() == list(span)
            assert (document.id, document.language) == (row["id"], row["lang"])


def test_texts_are_scored_behind_bos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # Rows of data sets often carry the chat that their text was made of.
    (tmp_path / "text.jsonl").write_text(lines([{"text": " "}, {**TEXT, **CHAT}, TEXT]))
    kind, documents = read_held_out(str(tmp_path / "text.jsonl"), tokenizer)
    assert kind == "text" and [document.id for document in documents] == ["2", "3"]
    expected = [tokenizer.bos_id, *tokenizer.encode("satu"), tokenizer.eos_id]
    for document in documents:
        assert document.tokens.tolist() == expected and document.num_bytes == 4
        assert document.scored.tolist() == [False] + [True] * (len(expected) - 1)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        *((TEXT, "text"), ({**TEXT, **PAIR}, "text"), ({**PAIR, **CHAT}, "pairs"), (CHAT, "chats")),
        *(({"text": None, **CHAT}, "chats"), ({"prompt": "a", "completion": "b", "chosen": None}, "chats")),
    ],
)
def test_the_first_row_tells_the_kind(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], kind: str
) -> None:
    (tmp_path / "set.jsonl").write_text(lines(["", row]))
    found, documents = read_held_out(str(tmp_path / "set.jsonl"), tokenizer)
    assert found == kind and len(documents) == (2 if kind == "pairs" else 1)


@pytest.mark.parametrize(
    ("first", "bad", "said_of_it"),
    [
        # Another kind than the first row's.
        (TEXT, CHAT, "a `text` string (it is one of chats, and a file's rows are all of one kind)"),
        (TEXT, PAIR, "(it is one of pairs,"),
        (CHAT, TEXT, "a chat that can be used (it is one of text,"),
        (CHAT, PAIR, "(it is one of pairs,"),
        (PAIR, CHAT, "a pair that can be used (it is one of chats,"),
        (PAIR, {"prompt": "a", "completion": "b"}, "(it is one of chats,"),
        # No JSON object.
        (CHAT, "{", "a chat that can be used (bad_json: "),
        (PAIR, '["prompt"]', "(bad_json: a list, not an object)"),
        # What the chat format refuses.
        (CHAT, {"messages": said("Hi", "Ya")[::-1]}, "(roles_do_not_alternate: "),
        (CHAT, {"messages": said("Hi")}, "(no_assistant_turn: "),
        (CHAT, {"messages": said("Hi", " ")}, "(empty_assistant_turn: message 2: "),
        (CHAT, {"messages": [{"role": "boss", "content": "Hi"}]}, "(unknown_role: "),
        (CHAT, {"messages": []}, "(missing_field: no messages)"),
        (CHAT, {"prompt": "Hi"}, "(missing_field: no completion)"),
        (CHAT, {"other": 1}, "(missing_field: "),
        (PAIR, {**PAIR, "rejected": "Ya"}, "(equal_answers: "),
        (PAIR, {**PAIR, **WRITTEN_ALIKE}, "(equal_answers: "),
        (PAIR, {"prompt": "Hi", "chosen": "Ya"}, "(missing_field: no rejected)"),
        (PAIR, {"other": 1}, "(missing_field: no prompt)"),
        # What names a row.
        (CHAT, {**CHAT, "lang": 5}, "(language_not_a_string: a int)"),
        (PAIR, {**PAIR, "id": "\ud800"}, "(lone_surrogate: at character 0)"),
    ],
)
def test_a_bad_row_is_named(
    tmp_path: Path, tokenizer: Tokenizer, first: dict[str, Any], bad: dict[str, Any] | str, said_of_it: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(lines([first, "", bad, first]))
    with pytest.raises(UserError) as refused:
        read_held_out(str(path), tokenizer)
    message = str(refused.value)
    assert message.startswith(f"{path}:3: not a") and said_of_it in message
    assert message.endswith("; correct or remove it") and "--kind" not in message
    # It is not come to.
    assert len(read_held_out(str(path), tokenizer, limit=1)[1]) == (2 if first is PAIR else 1)


@pytest.mark.parametrize(
    ("content", "said_of_it"),
    [
        ("\n{", r"set\.jsonl:2: not a JSON object \(bad_json"),
        ('{"content": "a"}', r"set\.jsonl:1: nothing in this row is evaluated; expected text, or messages"),
        ("\n \n", "holds no documents to evaluate on"),
        ("", "holds no documents to evaluate on"),
        ('{"text": " "}', "holds no documents to evaluate on"),
        ('{"messages": 5}', r"set\.jsonl:1: not a chat that can be used \(bad_shape"),
    ],
)
def test_files_without_a_first_row_to_go_by(
    tmp_path: Path, tokenizer: Tokenizer, content: str, said_of_it: str
) -> None:
    (tmp_path / "set.jsonl").write_text(content)
    with pytest.raises(UserError, match=said_of_it):
        read_held_out(str(tmp_path / "set.jsonl"), tokenizer)


def test_files_that_are_missing_or_cut_short(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no evaluation file .*none\.jsonl"):
        read_held_out(str(tmp_path / "none.jsonl"), tokenizer)
    packed = gzip.compress((lines([CHAT] * 1000) + "\n").encode())
    (tmp_path / "set.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cannot be read to its end"):
        read_held_out(str(tmp_path / "set.jsonl.gz"), tokenizer)


@pytest.mark.parametrize("context", [1, 2, 5, 8])
def test_what_is_scored_of_a_conversation_is_scored_once(context: int) -> None:
    """With the windows that a text of the same tokens has, but for those without anything to score."""
    rng = np.random.default_rng(context)
    for length in range(2, 40):
        ids = np.arange(100, 100 + length)
        scored = rng.random(length) < 0.2
        scored[0] = False
        pieces = list(cut(0, ids, context=context, scored=scored))
        found = [piece.targets[piece.num_context :][piece.scored] for piece in pieces]
        np.testing.assert_array_equal(np.concatenate([[], *found]), ids[scored])
        windows = {piece.targets[0]: piece for piece in cut(0, ids, context=context)}
        for piece in pieces:
            assert piece.scored.any() and len(piece.scored) == len(piece.targets) - piece.num_context
            of_text = windows[piece.targets[0]]
            np.testing.assert_array_equal(piece.tokens, of_text.tokens[: len(piece.tokens)])
            assert piece.num_context == of_text.num_context
        # Nothing is read behind what is scored last.
        if pieces:
            assert pieces[-1].targets[-1] == ids[scored][-1]
