"""What stands between Gemma 3's control tokens: the text of every turn, and tool calls read back from it.

Gemma 3 has no tokens for tools. Google's guide to function calling describes them in the prompt; ours is its
JSON form. This is a conversation with a system text and a tool:

    <bos><start_of_turn>user
    {system}

    You can call the functions below. ...
    [{"name": "weather", "description": ..., "parameters": {...}}]

    Will it rain in Johor?<end_of_turn>
    <start_of_turn>model
    {"name": "weather", "parameters": {"city": "Johor"}}<end_of_turn>
    <start_of_turn>user
    ```tool_output
    {"rain": true}
    ```<end_of_turn>
    <start_of_turn>model
    Yes, take an umbrella.<end_of_turn>

- Several calls stand on one line, with "; " between them. Text before them is set off by a blank line.
- Several results are several blocks, each after the other's last line, in the order of the calls.

`read_assistant_text` gives back exactly the turn that `assistant_text` wrote, if it has calls: there is no
newline in them, so they are what follows the last blank line. A turn without calls comes back too, unless its
last paragraph spells calls: in a format without control tokens, text that spells a call is one.
"""

from __future__ import annotations

import json

from sealion_jax.data.chat.conversation import AssistantTurn, Conversation, ToolCall, ToolTurn, UserTurn
from sealion_jax.data.chat.rows import to_json

TOOLS_INTRODUCTION = (
    "You can call the functions below. To call one, answer only with JSON in this form:\n"
    '{"name": function name, "parameters": {argument name: value}}\n'
    'Put "; " between several calls. You get what they return in blocks marked tool_output.\n'
)
CALL_SEPARATOR = "; "
RESULT_OPENING, RESULT_CLOSING = "```tool_output\n", "\n```"


def turn_texts(conversation: Conversation) -> list[str]:
    """The text of each turn, without the name of its role."""
    texts = []
    for turn in conversation.turns:
        if isinstance(turn, UserTurn):
            texts.append(turn.text)
        elif isinstance(turn, ToolTurn):
            texts.append("\n".join(RESULT_OPENING + result + RESULT_CLOSING for result in turn.results))
        else:
            texts.append(assistant_text(turn))
    texts[0] = "\n\n".join([*_preamble(conversation), texts[0]])
    return texts


def _preamble(conversation: Conversation) -> list[str]:
    system = [conversation.system] if conversation.system else []
    if not conversation.tools:
        return system
    return [*system, f"{TOOLS_INTRODUCTION}[{', '.join(conversation.tools)}]"]


def assistant_text(turn: AssistantTurn) -> str:
    """What the assistant writes in this turn."""
    calls = CALL_SEPARATOR.join(
        f'{{"name": {to_json(call.name)}, "parameters": {call.arguments}}}' for call in turn.calls
    )
    return "\n\n".join(part for part in (turn.text, calls) if part)


def learned_bytes(conversation: Conversation) -> int:
    """UTF-8 bytes of what the assistant says behind the prompt."""
    turns = conversation.turns[conversation.prompt_turns :]
    return sum(len(assistant_text(turn).encode()) for turn in turns if isinstance(turn, AssistantTurn))


def read_assistant_text(text: str) -> AssistantTurn:
    """The turn that a model's text stands for: the inverse of `assistant_text`, but for spacing in the JSON.

    Raises:
        RowError: the text is blank.
    """
    text = text.strip()
    before, _, last = text.rpartition("\n\n")
    calls = _read_calls(last)
    return AssistantTurn(text=before.strip(), calls=calls) if calls else AssistantTurn(text=text)


def _read_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls that the whole of `text` spells; none if any of it is something else."""
    decoder = json.JSONDecoder()
    calls: list[ToolCall] = []
    rest = text.strip()
    while True:
        try:
            value, end = decoder.raw_decode(rest)
            call = _read_call(value)
        except (ValueError, RecursionError):
            return ()
        if call is None:
            return ()
        calls.append(call)
        rest = rest[end:].lstrip()
        if not rest:
            return tuple(calls)
        if not rest.startswith(CALL_SEPARATOR.strip()):
            return ()
        rest = rest.removeprefix(CALL_SEPARATOR.strip()).lstrip()


def _read_call(value: object) -> ToolCall | None:
    if not isinstance(value, dict) or value.keys() != {"name", "parameters"}:
        return None
    name, parameters = value["name"], value["parameters"]
    if not isinstance(name, str) or not name or not isinstance(parameters, dict):
        return None
    arguments = to_json(parameters)
    (name + arguments).encode()  # half of a UTF-16 pair, which JSON can spell, is a ValueError: it is no text
    return ToolCall(name=name, arguments=arguments)
