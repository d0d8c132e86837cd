"""A conversation: what the model is asked turn after turn, and what is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sealion_jax.data.chat.rendering import render_prompt
from sealion_jax.data.chat.rows import prompt_from_fields
from sealion_jax.generation.generator import Completion
from sealion_jax.generation.prompts import Asking
from sealion_jax.generation.talk import Talk
from sealion_jax.tokenizer import Tokenizer, train_tokenizer

TEXT = "user model Hi! How are you? Fine, thanks. Be brief. And you? once upon a time there was"
CONTEXT = 150


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([TEXT], vocab_size=556, path=path)


class Scripted:
    """Stands for a generator: writes texts that are given beforehand, two tokens a piece."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], *, interrupt_after: int | None = None):
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.interrupt_after = interrupt_after
        self.asked: list[list[int]] = []
        self.limits: list[int] = []
        self.numbers: list[int] = []

    def stream(
        self, params: Any, prompts: list[list[int]], *, max_new_tokens: int, numbers: list[int]
    ) -> Iterator[list[list[int]]]:
        self.asked += prompts
        self.limits.append(max_new_tokens)
        self.numbers += numbers
        ids = [*self.tokenizer.encode(self.texts.pop(0)), self.tokenizer.end_of_turn_id][:max_new_tokens]
        for first in range(0, len(ids), 2):
            if self.interrupt_after is not None and first >= self.interrupt_after:
                raise KeyboardInterrupt
            yield [ids[first : first + 2]]

    def completion(self, ids: list[int]) -> Completion:
        ended = ids[-1] == self.tokenizer.end_of_turn_id
        return Completion(ids=tuple(ids), stopped="end" if ended else "length")


@pytest.fixture
def talk(tokenizer: Tokenizer) -> Callable[..., tuple[str, Scripted]]:
    """Runs a conversation of these lines; gives what was shown, and the generator."""

    def run(
        lines: Sequence[str],
        texts: Sequence[str],
        *,
        asking: Asking | None = None,
        limit: int = 100,
        **options,
    ) -> tuple[str, Scripted]:
        generator, shown, left = Scripted(tokenizer, texts, **options), [], iter(lines)

        def ask() -> str:
            for line in left:
                return line
            raise EOFError

        model: Any = SimpleNamespace(
            tokenizer=tokenizer, params=None, config=SimpleNamespace(max_context_tokens=CONTEXT)
        )
        played: Any = generator
        Talk(
            model=model,
            generator=played,
            asking=asking or Asking(format="chat"),
            max_new_tokens=limit,
            ask=ask,
            say=shown.append,
        ).run()
        return "".join(shown), generator

    return run


def prompt_of(messages: list[dict], tokenizer: Tokenizer) -> list[int]:
    return render_prompt(prompt_from_fields({"messages": messages}), tokenizer).tolist()


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_turns_are_remembered_until_reset(talk: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """The system text stays; blank lines ask nothing; each question has its own number."""
    shown, generator = talk(
        ["Hi!", "  ", " And you? ", "/reset", "Hi!", "/quit", "never"],
        ["How are you?", "Fine, thanks.", "Hi!"],
        asking=Asking(format="chat", system="Be brief."),
    )
    system, hi = said("system", "Be brief."), said("user", "Hi!")
    both = [system, hi, said("assistant", "How are you?"), said("user", "And you?")]
    assert generator.asked == [
        prompt_of(messages, tokenizer) for messages in ([system, hi], both, [system, hi])
    ]
    assert generator.numbers == [0, 1, 2]
    assert shown == "How are you?\nFine, thanks.\n(a new conversation)\nHi!\n"


def test_raw_lines_are_continued_each_by_itself(talk: Callable[..., Any], tokenizer: Tokenizer) -> None:
    asking = Asking(format="raw")
    shown, generator = talk(["once upon", "there was "], [" a time", "a time"], asking=asking)
    expected = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("once upon", "there was ")]
    assert generator.asked == expected
    assert shown == " a time\na time\n\n"


def test_an_answer_without_text_is_not_remembered(talk: Callable[..., Any], tokenizer: Tokenizer) -> None:
    shown, generator = talk(["Hi!", "And you?"], [" ", "Fine."])
    assert generator.asked[1] == prompt_of([said("user", "And you?")], tokenizer)
    assert "(no answer; the question is forgotten)\n" in shown


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_went(
    talk: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    text = "How are you? Fine, thanks."
    cut = tokenizer.decode(tokenizer.encode(text)[:4])
    shown, generator = talk(["Hi!"], [text], interrupt_after=4)
    assert shown == f"{cut} (stopped)\n\n"
    shown, generator = talk(["Hi!", "And you?"], [text, "Fine."], limit=4)
    assert shown.startswith(f"{cut} (stopped after 4 tokens)\n")
    messages = [said("user", "Hi!"), said("assistant", cut), said("user", "And you?")]
    assert generator.asked[1] == prompt_of(messages, tokenizer)


def test_the_end_of_the_context(talk: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """What is left of it is used; a conversation that fills it is told, and its last line forgotten."""
    prompt = prompt_of([said("user", "Hi!")], tokenizer)
    lines = ["Hi!", " ".join(["there"] * CONTEXT), "Hi!"]
    shown, generator = talk(lines, ["Fine.", "Fine."], limit=CONTEXT - 1)
    assert generator.limits[0] == CONTEXT - len(prompt)
    assert len(generator.asked) == 2 and "more than the model's context; /reset begins a new" in shown
    messages = [said("user", "Hi!"), said("assistant", "Fine."), said("user", "Hi!")]
    assert generator.asked[1] == prompt_of(messages, tokenizer)


def test_a_line_that_is_not_utf8_is_asked_all_the_same(
    talk: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    _, generator = talk([b"Hi\xff!".decode("utf-8", "surrogateescape")], ["Fine."])
    assert generator.asked == [prompt_of([said("user", "Hi\ufffd!")], tokenizer)]
