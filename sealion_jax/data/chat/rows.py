"""A row's fields as a checked conversation or preference, or a `RowError` that says why not.

    {"messages": [...], "tools": [...]}                     a chat, in OpenAI's form
    {"prompt": ..., "completion": ..., "tools": [...]}      learned from the completion alone
    {"prompt": ..., "chosen": ..., "rejected": ..., "tools": [...]}

Prompt, completion and answers are a string or a list of messages. Other fields are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sealion_jax.data.chat.conversation import (
    AssistantTurn,
    Conversation,
    Preference,
    RowError,
    ToolCall,
    ToolTurn,
    Turn,
    UserTurn,
)

Message = Mapping[str, object]


def chat_from_fields(fields: Mapping[str, object]) -> Conversation:
    """The chat of a row with messages, or with a prompt and a completion.

    Raises:
        RowError: the row cannot be used, or nothing in it is the assistant's.
    """
    tools = _tools(fields.get("tools"))
    if fields.get("messages") is not None:
        chat = _conversation(_messages(fields, "messages", role="user"), tools)
    elif fields.get("prompt") is not None:
        prompt = _messages(fields, "prompt", role="user")
        chat = _continued(prompt, _messages(fields, "completion", role="assistant"), tools)
    else:
        raise RowError("missing_field", "neither messages nor a prompt; expected one of them")
    if not chat.has_answer:
        raise RowError("no_assistant_turn", "nothing in it is the assistant's, so there is nothing to learn")
    return chat


def prompt_from_fields(fields: Mapping[str, object]) -> Conversation:
    """The conversation of a row with messages, or with a prompt, that waits for the assistant's answer.

    Raises:
        RowError: the row cannot be used, or its last turn is the assistant's already.
    """
    name = "messages" if fields.get("messages") is not None else "prompt"
    prompt = _conversation(_messages(fields, name, role="user"), _tools(fields.get("tools")))
    _check_waits(prompt)
    return prompt


def preference_from_fields(fields: Mapping[str, object]) -> Preference:
    """The two conversations of a row with a prompt, a chosen and a rejected answer.

    Raises:
        RowError: the row cannot be used.
    """
    tools = _tools(fields.get("tools"))
    prompt = _messages(fields, "prompt", role="user")
    chosen, rejected = (
        _continued(prompt, _messages(fields, name, role="assistant"), tools)
        for name in ("chosen", "rejected")
    )
    return Preference(chosen=chosen, rejected=rejected)


def to_json(value: object) -> str:
    """JSON as Transformers' chat templates write it; raises ValueError for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _continued(prompt: Sequence[Message], answer: Sequence[Message], tools: tuple[str, ...]) -> Conversation:
    given = _conversation(prompt, tools)
    _check_waits(given)
    if answer[0].get("role") != "assistant":
        raise RowError(
            "roles_do_not_alternate",
            f"the answer begins with role {answer[0].get('role')!r}; expected what follows the prompt, "
            "from the assistant on",
        )
    return _conversation([*prompt, *answer], tools, prompt_turns=len(given.turns))


def _check_waits(prompt: Conversation) -> None:
    if prompt.ends_with_assistant:
        raise RowError(
            "roles_do_not_alternate",
            "the prompt ends with the assistant; expected it to end with a user or tool message",
        )


def _conversation(
    messages: Sequence[Message], tools: tuple[str, ...], *, prompt_turns: int = 0
) -> Conversation:
    turns: list[Turn] = []
    system = ""
    waiting: list[object] | None = None
    for number, message in enumerate(messages, 1):
        try:
            if number == 1 and message.get("role") == "system":
                system = _text(message)
            elif message.get("role") == "tool":
                waiting = _waiting_after(waiting, message.get("tool_call_id"))
                _add_result(turns, _text(message))
            else:
                turns.append(_turn(message))
                waiting = _call_ids(message)
        except RowError as error:
            raise RowError(error.reason, f"message {number}: {error.detail}") from None
    return Conversation(turns=tuple(turns), system=system, tools=tools, prompt_turns=prompt_turns)


def _add_result(turns: list[Turn], result: str) -> None:
    last = turns[-1] if turns else None
    if isinstance(last, ToolTurn):
        turns[-1] = ToolTurn(results=(*last.results, result))
    else:
        turns.append(ToolTurn(results=(result,)))


def _turn(message: Message) -> UserTurn | AssistantTurn:
    role = message.get("role")
    if role == "user":
        return UserTurn(text=_text(message))
    if role == "assistant":
        return AssistantTurn(text=_text(message), calls=_calls(message))
    if role == "system":
        raise RowError("system_not_first", "only the first message may be the system's")
    raise RowError("unknown_role", f"its role is {role!r}; expected system, user, assistant or tool")


def _calls(message: Message) -> tuple[ToolCall, ...]:
    value = message.get("tool_calls")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError("bad_shape", f"tool_calls is {_kind(value)}; expected a list")
    return tuple(_call(call, f"tool call {number}") for number, call in enumerate(value, 1))


def _call(value: object, where: str) -> ToolCall:
    function = _function(value, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError("arguments_not_json", f"{where}: {error}: {arguments[:80]!r}") from None
    if not isinstance(arguments, dict):
        raise RowError(
            "arguments_not_json", f"{where}: its arguments are {_kind(arguments)}; expected an object"
        )
    try:
        spelled = to_json(arguments)
    except ValueError as error:
        raise RowError("arguments_not_json", f"{where}: {error}") from None
    return ToolCall(name=_whole(str(function["name"]), where), arguments=_whole(spelled, where))


def _call_ids(message: Message) -> list[object] | None:
    """The ids of a message's calls, None where it does not name each of them."""
    calls = message.get("tool_calls")
    ids: list[object] = []
    if isinstance(calls, list):
        ids = [call.get("id") for call in calls if isinstance(call, dict)]
    return None if not ids or None in ids else ids


def _waiting_after(waiting: list[object] | None, result_of: object) -> list[object] | None:
    """The ids of the calls that may still get a result, after one of `result_of`; None where none are given.

    The format has no ids: a result is told by its place. So results out of order would be told wrongly.
    """
    if waiting is None or result_of is None:
        return waiting
    if result_of not in waiting:
        raise RowError(
            "tool_result_without_call",
            f"a result of call {result_of!r}; the calls that wait for one are {waiting}, and results are "
            "expected in the order of the calls",
        )
    return waiting[waiting.index(result_of) + 1 :]


def _tools(value: object) -> tuple[str, ...]:
    """The declarations, each as JSON. The list may be given as JSON itself, as Parquet files have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("bad_tool", f"tools is a string that is no JSON: {error}") from None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError("bad_shape", f"tools is {_kind(value)}; expected a list")
    declarations = [_function(tool, f"tool {number}") for number, tool in enumerate(value, 1)]
    try:
        spelled = [to_json(declaration) for declaration in declarations]
    except ValueError as error:
        raise RowError("bad_tool", f"tools: {error}") from None
    return tuple(_whole(text, "tools") for text in spelled)


def _function(value: object, where: str) -> dict[str, object]:
    """What is under `function`, or the object itself where there is no such layer."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise RowError("bad_shape", f"{where} is {_kind(value)}; expected an object")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise RowError("bad_tool", f"{where} has no name")
    return value


def _messages(fields: Mapping[str, object], name: str, *, role: str) -> list[Message]:
    """The messages of a field; a string is one message, of `role`."""
    value = fields.get(name)
    if isinstance(value, str) and name != "messages":
        return [{"role": role, "content": value}]
    if value is None or value == []:
        raise RowError("missing_field", f"no {name}")
    if not isinstance(value, list):
        raise RowError("bad_shape", f"{name} is {_kind(value)}; expected a list of messages")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise RowError("bad_shape", f"message {number} of {name} is {_kind(message)}; expected an object")
    return value


def _text(message: Message) -> str:
    """The message's text, stripped; where the assistant calls a tool it may be missing."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise RowError("content_not_a_string", f"its content is {_kind(content)}; expected a string")
    return _whole(content.strip(), "its content")


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise RowError("content_not_a_string", "its content is a list with a part that has no type")
    if kind != "text":
        raise RowError("content_not_text", f"its content has a part of type {kind!r}; only text is read")
    if not isinstance(part.get("text"), str):
        raise RowError("content_not_a_string", f"the text of a part is {_kind(part.get('text'))}")
    return part["text"]


def _whole(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("lone_surrogate", f"{where}, at character {error.start}") from None
    return text


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _kind(value: object) -> str:
    number = isinstance(value, int | float)
    return _KINDS.get(type(value), "a number" if number else f"a {type(value).__name__}")
