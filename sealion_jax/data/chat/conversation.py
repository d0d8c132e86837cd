"""Conversations and pairs of answers, checked: what `rows` reads and `rendering` turns into tokens.

A conversation is turns that alternate, the user's first. A tool's results are the user's side of it:

    system, tools                           put into the first user turn
    turns[0]   UserTurn                     a question
    turns[1]   AssistantTurn  with calls    "call this function for me"
    turns[2]   ToolTurn                     what the calls gave
    turns[3]   AssistantTurn                the answer

Texts are stripped, as Gemma 3's chat format wants them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

ChatReason = Literal[
    "missing_field",  # no messages, no prompt, no completion, ... or an empty list of them
    "bad_shape",  # a list or an object was expected there
    "unknown_role",
    "system_not_first",
    "roles_do_not_alternate",
    "content_not_a_string",
    "content_not_text",  # a part of a message that is an image, a sound, ...
    "empty_user_turn",
    "empty_assistant_turn",
    "bad_tool",  # a declaration or a call without a name, or with something that JSON cannot hold
    "arguments_not_json",
    "tool_result_without_call",
    "no_assistant_turn",  # nothing to learn from
    "equal_answers",
    "lone_surrogate",  # JSON can spell half of a UTF-16 pair, which no text has
]


class RowError(ValueError):
    """A row that cannot be used: `reason` is for counting, `detail` says it for people."""

    def __init__(self, reason: ChatReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: ChatReason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of the function `name`; `arguments` is a JSON object in the spelling of `rows.to_json`.

    Equal calls are spelled equally: 1, 1.0 and true differ, and so does the order of the arguments.
    """

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserTurn:
    text: str

    def __post_init__(self) -> None:
        _check_stripped(self.text)
        if not self.text:
            raise RowError("empty_user_turn", "a user turn has no text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolTurn:
    """The results of calls of the turn before, in the order of those calls."""

    results: tuple[str, ...]

    def __post_init__(self) -> None:
        for text in self.results:
            _check_stripped(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssistantTurn:
    """What the assistant says, calls, or both; the calls come last."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        _check_stripped(self.text)
        if not self.text and not self.calls:
            raise RowError("empty_assistant_turn", "an assistant turn has neither text nor tool calls")


Turn = UserTurn | ToolTurn | AssistantTurn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns that alternate, the user's first; it may end with the user's, as a prompt does.

    Attributes:
        turns: at least one.
        system: put before the first user text; "" for none.
        tools: the declaration of each function, a JSON object as `rows.to_json` spells it.
        prompt_turns: so many turns at the start are given, and nothing is learned from them. They are the
            prompt of a completion or of an answer; a chat has 0.
    """

    turns: tuple[Turn, ...]
    system: str = ""
    tools: tuple[str, ...] = ()
    prompt_turns: int = 0

    def __post_init__(self) -> None:
        _check_stripped(self.system)
        if not self.turns:
            raise RowError("missing_field", "a conversation without turns")
        for number, turn in enumerate(self.turns):
            if isinstance(turn, AssistantTurn) != (number % 2 == 1):
                raise RowError("roles_do_not_alternate", _told(self.turns[: number + 1]))
            if isinstance(turn, ToolTurn):
                self._check_results(number, turn)

    def _check_results(self, number: int, turn: ToolTurn) -> None:
        before = self.turns[number - 1] if number else None
        calls = len(before.calls) if isinstance(before, AssistantTurn) else 0
        if len(turn.results) > calls:
            raise RowError(
                "tool_result_without_call",
                f"{len(turn.results)} tool results follow {calls} tool calls; expected a call for each",
            )

    @property
    def ends_with_assistant(self) -> bool:
        return isinstance(self.turns[-1], AssistantTurn)

    @property
    def has_answer(self) -> bool:
        """Whether there is an assistant turn that is not part of the prompt."""
        return any(isinstance(turn, AssistantTurn) for turn in self.turns[self.prompt_turns :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """One prompt with two answers: both conversations share the turns before `prompt_turns`."""

    chosen: Conversation
    rejected: Conversation

    def __post_init__(self) -> None:
        given = self.chosen.prompt_turns
        if given != self.rejected.prompt_turns or self.chosen.turns[:given] != self.rejected.turns[:given]:
            raise ValueError("the two conversations of a preference must share their prompt")
        if self.chosen == self.rejected:
            raise RowError("equal_answers", "the chosen and the rejected answer are the same")


def _check_stripped(text: str) -> None:
    if text != text.strip():
        raise ValueError(f"a text of a conversation begins or ends with whitespace: {text[:60]!r}; strip it")


_ROLES: dict[type, str] = {UserTurn: "user", ToolTurn: "tool", AssistantTurn: "assistant"}


def _told(turns: tuple[Turn, ...]) -> str:
    roles = [_ROLES[type(turn)] for turn in turns]
    shown = roles if len(roles) <= 4 else ["...", *roles[-4:]]
    return (
        f"the turns are {' '.join(shown)}; expected the user's (or tool results) and the assistant's, "
        "one after the other, beginning with the user's"
    )
