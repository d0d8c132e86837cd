"""The preference pairs in the package: readable, short, held-out rows apart, each in its own language.

A pair's place tells how its rejected answer is worse, in every file: 1, 4, 7 and 9 answer in another
language; 2, 5 and 10 are rude, evasive or beside the question; 3 and 8 are wrong; 6 repeats itself. The last
two are held out.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest

from sealion_jax.data.chat.conversation import AssistantTurn, UserTurn
from sealion_jax.data.chat.rendering import render_chat
from sealion_jax.data.chat.rows import preference_from_fields
from sealion_jax.embedded import embedded
from sealion_jax.tokenizer import Tokenizer
from tests.data.chat.builtin import CORPUS, LANGUAGES, SAME, Row, grams, language_of, rows, sentences

PLACES = range(1, 11)
HELD_OUT = {9, 10}
OTHER_LANGUAGE = {1, 4, 7, 9}
LONG_WINDED = 6


def said(row: Row, name: str) -> str:
    """The text of the one message in a field of a pair."""
    (message,) = row[name]  # pyright: ignore[reportGeneralTypeIssues]
    return message["content"]


@pytest.fixture(scope="module")
def pairs() -> dict[tuple[str, int], Row]:
    """Each pair, by its language and its place in the file."""
    return {
        (language, place): row
        for language in LANGUAGES
        for place, row in enumerate(rows(CORPUS / "pairs" / f"{language}.jsonl"), 1)
    }


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """The documents of the text corpus."""
    return {
        language: [str(row["text"]) for row in rows(CORPUS / "texts" / f"{language}.jsonl")]
        for language in LANGUAGES
    }


def test_every_line_has_the_form_that_is_promised(pairs: dict[tuple[str, int], Row]) -> None:
    assert sorted(path.stem for path in (CORPUS / "pairs").iterdir()) == LANGUAGES
    assert set(pairs) == {(language, place) for language in LANGUAGES for place in PLACES}
    for (language, place), row in pairs.items():
        expected = {
            "prompt": [{"role": "user", "content": said(row, "prompt")}],
            "chosen": [{"role": "assistant", "content": said(row, "chosen")}],
            "rejected": [{"role": "assistant", "content": said(row, "rejected")}],
            "lang": language,
            "source": "sealion_jax",
            "id": f"{language}-pair-{place:02d}",
        }
        assert json.dumps(row) == json.dumps(expected), "the keys are in this order too"
    for language in LANGUAGES:
        content = (CORPUS / "pairs" / f"{language}.jsonl").read_text("utf-8")
        assert unicodedata.is_normalized("NFC", content)
        assert content.endswith("}\n") and "\\u" not in content


def test_pairs_are_read_and_fit_a_short_sequence(
    pairs: dict[tuple[str, int], Row], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = Tokenizer.load(embedded(cache=tmp_path_factory.mktemp("cache")).tokenizer)
    for (_, place), row in pairs.items():
        preference = preference_from_fields(row)
        lengths = {}
        for name, conversation in (("chosen", preference.chosen), ("rejected", preference.rejected)):
            question, answer = UserTurn(text=said(row, "prompt")), AssistantTurn(text=said(row, name))
            assert conversation.turns == (question, answer) and conversation.prompt_turns == 1
            rendered = render_chat(conversation, tokenizer)
            ((start, stop),) = rendered.learned_spans
            assert tokenizer.decode(rendered.ids[start : stop - 1]) == answer.text
            lengths[name] = len(rendered.ids)
        assert sum(lengths.values()) <= 250, (row["id"], lengths)
        if place == LONG_WINDED:
            assert lengths["rejected"] > 1.3 * lengths["chosen"], (row["id"], lengths)


def test_no_sentence_of_a_held_out_pair_stands_elsewhere(
    pairs: dict[tuple[str, int], Row], texts: dict[str, list[str]]
) -> None:
    """Neither in the pairs to train on, of whatever language, nor in the text corpus, nor twice in itself."""
    assert sentences("Harga 2.500. Air naik!\nBenar?") == {"harga 2.500.", "air naik!", "benar?"}
    elsewhere = {
        sentence for documents in texts.values() for text in documents for sentence in sentences(text)
    }
    held_out: list[str] = []
    for (_, place), row in pairs.items():
        for name in ("prompt", "chosen", "rejected"):
            if place in HELD_OUT:
                held_out += sentences(said(row, name))
            else:
                elsewhere |= sentences(said(row, name))
    assert elsewhere.isdisjoint(held_out)
    assert len(held_out) == len(set(held_out)) > 6 * len(LANGUAGES)


def test_answers_are_in_the_language_that_they_should_be_in(
    pairs: dict[tuple[str, int], Row], texts: dict[str, list[str]]
) -> None:
    """Judged by the text corpus, whose own held-out documents say that the judge can be trusted."""
    counts = {language: Counter(grams("\n".join(texts[language][:-2]))) for language in LANGUAGES}
    for language in LANGUAGES:
        own = SAME.get(language, language)
        held_out = [line for text in texts[language][-2:] for line in text.splitlines()]
        assert [language_of(line, counts) for line in held_out] == [own] * len(held_out)
        others = set()
        for place in PLACES:
            row = pairs[language, place]
            assert language_of(said(row, "chosen"), counts) == own, row["id"]
            found = language_of(said(row, "rejected"), counts)
            assert (found != own) == (place in OTHER_LANGUAGE), (row["id"], found)
            others.add(found)
        assert len(others - {own, "en"}) == (4 if language == "en" else 1)
