"""Text that comes token by token is the text of all tokens, and never a part of a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealion_jax.generation.text_stream import TextStream
from sealion_jax.tokenizer import Tokenizer, train_tokenizer

WORDS = "selamat pagi apa kabar hari ini nasi goreng enak sekali terima kasih"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([WORDS, WORDS.title()], vocab_size=580, path=path)


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """The parts that are shown when the ids come in pieces of these sizes, the rest in one."""
    stream, parts, first = TextStream(tokenizer), [], 0
    for size in [*sizes, len(ids)]:
        parts.append(stream.add(ids[first : first + size]))
        first += size
    return [*parts, stream.rest()]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ai kn\n😀ខ្មែរ中é!\u2581"), max_size=12),
    sizes=st.lists(st.integers(0, 4), max_size=30),
)
def test_whole_characters_come_as_they_are_complete(
    tokenizer: Tokenizer, text: str, sizes: list[int]
) -> None:
    parts = streamed(tokenizer, tokenizer.encode(text), sizes)
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))
    assert "\ufffd" not in "".join(parts) and parts[-1] == ""


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(238, 493), st.integers(0, 579)), max_size=20),
    sizes=st.lists(st.integers(0, 3), max_size=20),
)
def test_any_tokens_give_their_text(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    """Bytes that make no character too, as a model that is not trained writes them."""
    assert "".join(streamed(tokenizer, ids, sizes)) == tokenizer.decode(ids)


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("pagi 😀!")
    assert streamed(tokenizer, ids, [1] * len(ids))[-7:] == ["", "", "", "😀", "!", "", ""]
    assert streamed(tokenizer, ids[:-2], [1] * len(ids))[-1] == tokenizer.decode(ids[-5:-2]) != ""
