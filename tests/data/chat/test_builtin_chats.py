"""The chats in the package: readable, short, held-out rows apart, each in its own language.

A chat's place tells what it is, in every file: 3, 6 and 11 have several questions, 5 and 11 a system text; 7
and 15 use a tool, 8 translates, 10 sums up. The last two are held out.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

import pytest

from sealion_jax.data.chat.conversation import AssistantTurn
from sealion_jax.data.chat.rendering import render_chat
from sealion_jax.data.chat.rows import chat_from_fields
from sealion_jax.embedded import embedded
from sealion_jax.tokenizer import Tokenizer
from tests.data.chat.builtin import CORPUS, LANGUAGES, SAME, Row, grams, language_of, rows, sentences

PLACES = range(1, 16)
HELD_OUT = {14, 15}
HELD_OUT_PAIRS = {9, 10}
SEVERAL_QUESTIONS = {3, 6, 11}
WITH_SYSTEM = {5, 11}
WITH_TOOL = {7, 15}
TRANSLATION = 8
SUMMARY = 10
MAX_TOKENS = 240
# The introduction of tools alone is 130 tokens of this small vocabulary; the least chat with one has 306.
MAX_TOKENS_WITH_TOOL = 384

Message = dict[str, object]
Chats = dict[tuple[str, int], Row]


def messages(row: Row) -> list[Message]:
    return row["messages"]  # pyright: ignore[reportReturnType]


def said(row: Row, *roles: str) -> list[str]:
    """The texts of the messages of these roles, of all roles where none is named."""
    texts = [str(message["content"]) for message in messages(row) if not roles or message["role"] in roles]
    return [text for text in texts if text]


@pytest.fixture(scope="module")
def chats() -> Chats:
    """Each chat, by its language and its place in the file."""
    return {
        (language, place): row
        for language in LANGUAGES
        for place, row in enumerate(rows(CORPUS / "chats" / f"{language}.jsonl"), 1)
    }


def test_every_line_has_the_form_that_is_promised(chats: Chats) -> None:
    assert sorted(path.name for path in (CORPUS / "chats").iterdir()) == [
        f"{name}.jsonl" for name in LANGUAGES
    ]
    assert set(chats) == set(itertools.product(LANGUAGES, PLACES))
    for (language, place), row in chats.items():
        keys = ["messages", "tools"] if place in WITH_TOOL else ["messages"]
        assert list(row) == [*keys, "lang", "source", "id"], row["id"]
        expected = {"lang": language, "source": "sealion_jax", "id": f"{language}-chat-{place:02d}"}
        assert expected.items() <= row.items()
        assert all(list(message)[:2] == ["role", "content"] for message in messages(row)), row["id"]
        roles = [str(message["role"]) for message in messages(row)]
        if place in WITH_SYSTEM:
            assert roles.pop(0) == "system", row["id"]
        if place in WITH_TOOL:
            assert roles == ["user", "assistant", "tool", "assistant"], row["id"]
        else:
            questions = len(roles) // 2
            assert roles == ["user", "assistant"] * questions, row["id"]
            assert questions in ({2, 3} if place in SEVERAL_QUESTIONS else {1}), row["id"]
    for language in LANGUAGES:
        content = (CORPUS / "chats" / f"{language}.jsonl").read_text("utf-8")
        assert unicodedata.is_normalized("NFC", content)
        assert content.endswith("}\n") and "\\u" not in content


def test_chats_are_read_and_fit_a_short_sequence(
    chats: Chats, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = Tokenizer.load(embedded(cache=tmp_path_factory.mktemp("cache")).tokenizer)
    for (_, place), row in chats.items():
        conversation = chat_from_fields(row)
        assert conversation.ends_with_assistant and conversation.prompt_turns == 0
        rendered = render_chat(conversation, tokenizer)
        learned = [tokenizer.decode(rendered.ids[start : stop - 1]) for start, stop in rendered.learned_spans]
        turns = [turn for turn in conversation.turns if isinstance(turn, AssistantTurn)]
        answers = [(told, turn.text) for told, turn in zip(learned, turns, strict=True) if not turn.calls]
        assert [told for told, _ in answers] == [text for _, text in answers] == said(row, "assistant")
        limit = MAX_TOKENS_WITH_TOOL if place in WITH_TOOL else MAX_TOKENS
        assert len(rendered.ids) <= limit, (row["id"], len(rendered.ids))
        assert all(len(text.split()) <= 40 for text in said(row, "assistant")), row["id"]
        assert place == SUMMARY or all(len(text.split()) <= 15 for text in said(row, "user")), row["id"]


def numbers(text: str) -> set[int]:
    """The whole numbers in a text, those with marks between thousands too."""
    return {int(digits) for digits in re.findall(r"\d+", re.sub(r"(?<=\d)[.,](?=\d{3})", "", text))}


def test_tools_are_called_as_declared_and_their_results_are_told(chats: Chats) -> None:
    assert numbers("Rp35.000, 1,200, ៣៣. 7,5") == {35000, 1200, 33, 7, 5}
    for language, place in itertools.product(LANGUAGES, sorted(WITH_TOOL)):
        row = chats[language, place]
        _, calling, told, _ = messages(row)
        (tool,) = row["tools"]  # pyright: ignore[reportGeneralTypeIssues]
        (call,) = calling["tool_calls"]  # pyright: ignore[reportGeneralTypeIssues]
        assert tool["type"] == call["type"] == "function" and calling["content"] == ""
        declared, called = tool["function"], call["function"]
        assert list(declared) == ["name", "description", "parameters"]
        assert called["name"] == declared["name"]
        parameters = declared["parameters"]
        assert list(parameters["properties"]) == parameters["required"] == list(called["arguments"])
        assert parameters["type"] == "object"
        for name, value in called["arguments"].items():
            assert parameters["properties"][name] == {"type": "string"} and isinstance(value, str)
        (answer,) = said(row, "assistant")
        (result,) = json.loads(str(told["content"])).values()
        assert numbers(answer) == {result}, row["id"]


def other_texts(*, held_out: bool) -> Iterator[str]:
    """The held-out texts and pairs of the package, or all of them."""
    for language in LANGUAGES:
        texts = [str(row["text"]) for row in rows(CORPUS / "texts" / f"{language}.jsonl")]
        yield from texts[-2:] if held_out else texts
        for place, row in enumerate(rows(CORPUS / "pairs" / f"{language}.jsonl"), 1):
            if place in HELD_OUT_PAIRS or not held_out:
                for name in ("prompt", "chosen", "rejected"):
                    (message,) = row[name]  # pyright: ignore[reportGeneralTypeIssues]
                    yield message["content"]


def sentences_of(texts: Iterator[str]) -> set[str]:
    # Thai's repetition mark follows a space, which divides nothing.
    return {sentence for text in texts for sentence in sentences(text.replace(" ๆ", "ๆ"))}


def test_no_sentence_that_is_held_out_is_learned(chats: Chats) -> None:
    """Held-out chats share none with all else here, and other chats none with held-out texts or pairs."""
    learned = sentences_of(
        text for (_, place), row in chats.items() if place not in HELD_OUT for text in said(row)
    )
    held_out: list[str] = []
    for (_, place), row in chats.items():
        if place in HELD_OUT:
            held_out += sentences_of(iter(said(row)))
    assert len(held_out) == len(set(held_out)) > 5 * len(LANGUAGES)
    assert learned.isdisjoint(held_out)
    assert sentences_of(other_texts(held_out=False)).isdisjoint(held_out)
    assert sentences_of(other_texts(held_out=True)).isdisjoint(learned)


def test_answers_are_in_the_language_of_the_question(chats: Chats) -> None:
    """Judged by the text corpus, as the answers of the pairs are. A translation has two languages."""
    counts = {
        language: Counter(
            grams("\n".join(str(row["text"]) for row in rows(CORPUS / "texts" / f"{language}.jsonl")[:-2]))
        )
        for language in LANGUAGES
    }
    for (language, place), row in chats.items():
        if place != TRANSLATION:
            found = language_of("\n".join(said(row, "assistant")), counts)
            assert found == SAME.get(language, language), (row["id"], found)
