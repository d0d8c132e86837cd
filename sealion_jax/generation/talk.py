"""A conversation on a terminal: a line is asked for, the answer is shown as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sealion_jax.data.chat.conversation import Conversation, RowError, Turn, UserTurn
from sealion_jax.data.chat.format import read_assistant_text
from sealion_jax.generation.generator import Generator
from sealion_jax.generation.loading import LoadedModel
from sealion_jax.generation.prompts import Asking, chat_ids, raw_ids
from sealion_jax.generation.text_stream import TextStream

PIECE_TOKENS = 4
"""Tokens between two looks at what is being written: few, so that it flows."""

HELP = "/reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(kw_only=True)
class Talk:
    """A conversation with a model, that remembers its turns (in the raw format there is nothing to remember).

    Attributes:
        ask: gives the next line, or raises EOFError.
        say: shows text as it is, at once.
    """

    model: LoadedModel
    generator: Generator
    asking: Asking
    max_new_tokens: int
    ask: Callable[[], str]
    say: Callable[[str], None]
    turns: tuple[Turn, ...] = ()
    number: int = field(default=0, init=False)
    """Of the question: what draws depend on beside the seed."""

    def run(self) -> None:
        """Asks and answers until the input ends."""
        while True:
            try:
                line = _whole(self.ask())
            except EOFError:
                self.say("\n")
                return
            if line.strip() == "/quit":
                return
            if line.strip() == "/reset":
                self.turns = ()
                self.say("(a new conversation)\n")
            elif line.strip():
                self.answer(line)

    def answer(self, text: str) -> None:
        """Shows the answer to a line; in a chat both become part of the conversation."""
        tokenizer = self.model.tokenizer
        if self.asking.format == "raw":
            self._write(raw_ids(text, tokenizer))
            return
        asked = (*self.turns, UserTurn(text=text.strip()))
        conversation = Conversation(turns=asked, system=self.asking.system.strip())
        written = self._write(chat_ids(conversation, tokenizer))
        try:
            self.turns = (*asked, read_assistant_text(written))
        except RowError:
            self.say("(no answer; the question is forgotten)\n")

    def _write(self, prompt: list[int]) -> str:
        """What the model writes after the prompt, shown as it comes."""
        room = self.model.config.max_context_tokens - len(prompt)
        if room < 1:
            self.say(f"(this makes {len(prompt)} tokens, more than the model's context; {HELP})\n")
            return ""
        allowed = min(room, self.max_new_tokens)
        stops = self.model.tokenizer.stop_ids
        stream, text, ids = TextStream(self.model.tokenizer), "", []
        pieces = self.generator.stream(
            self.model.params, [prompt], max_new_tokens=allowed, numbers=[self.number]
        )
        self.number += 1
        note = ""
        try:
            for (new,) in pieces:
                ids += new
                text += self._show(stream.add(token for token in new if token not in stops))
            if self.generator.completion(ids).stopped == "length":
                note = f" (stopped after {len(ids)} tokens)"
        except KeyboardInterrupt:
            note = " (stopped)"
        text += self._show(stream.rest())
        self.say(f"{note}\n")
        return text

    def _show(self, text: str) -> str:
        self.say(text)
        return text


def _whole(line: str) -> str:
    """The line with what the terminal gave that is not UTF-8 replaced."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
