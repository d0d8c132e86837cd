"""A row of some source as a conversation or a pair, or the reason why it cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from sealion_jax.data.chat.conversation import Conversation, Preference, RowError
from sealion_jax.data.chat.format import turn_texts
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.inputs.kinds import content_fields, hint
from sealion_jax.data.inputs.rows import FieldNames, Skipped, labels, not_utf8, surrogate_in
from sealion_jax.data.store.manifest import StoreKind

Content = TypeVar("Content", Conversation, Preference)
_LONGEST_DETAIL = 300  # characters: a detail may quote what it complains of
_DEEPEST = 100  # Python's own limit depends on its version and on who calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Generic[Content]):
    """A conversation or a pair and where it stood; `fields` are the row's own, but for what it is called."""

    content: Content
    fields: Mapping[str, object]
    language: str
    id: str | None
    line: int


def chat_example(
    fields: Mapping[str, object], names: FieldNames, *, line: int
) -> Example[Conversation] | Skipped:
    """The conversation in a row's fields; strings may come as UTF-8 bytes."""
    return _example(fields, names, line, kind="chats", read=chat_from_fields)


def pair_example(
    fields: Mapping[str, object], names: FieldNames, *, line: int
) -> Example[Preference] | Skipped:
    """The pair in a row's fields; strings may come as UTF-8 bytes."""
    return _example(fields, names, line, kind="pairs", read=_preference)


def _preference(fields: Mapping[str, object]) -> Preference:
    preference = preference_from_fields(fields)
    # A call, and a text that spells it, are written alike.
    if turn_texts(preference.chosen) == turn_texts(preference.rejected):
        raise RowError("equal_answers", "the chosen and the rejected answer are written alike")
    return preference


def _example(
    fields: Mapping[str, object],
    names: FieldNames,
    line: int,
    *,
    kind: StoreKind,
    read: Callable[[Mapping[str, object]], Content],
) -> Example[Content] | Skipped:
    present = {name for name, value in fields.items() if value is not None}
    try:
        own = {
            name: _decoded(fields[name]) for name in content_fields(kind, text=names.text) if name in present
        }
        content = read(own)
        language, name = labels(fields, names)
    except UnicodeDecodeError as error:
        return not_utf8(error, line=line)
    except RecursionError:
        return Skipped(reason="bad_json", line=line, detail=f"it is nested more than {_DEEPEST} deep")
    except RowError as error:
        advice = hint(kind, present) if error.reason == "missing_field" else ""
        return Skipped(reason=error.reason, line=line, detail=error.detail[:_LONGEST_DETAIL] + advice)
    if not isinstance(language, str):
        return Skipped(reason="language_not_a_string", line=line, detail=f"a {type(language).__name__}")
    return surrogate_in(language, name or "", line=line) or Example(
        content=content, fields=own, language=language, id=name, line=line
    )


def _decoded(value: object, depth: int = 0) -> object:
    """The value with its strings as such, where they came as UTF-8 bytes; RecursionError for a deep one."""
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_decoded(inner, depth + 1) for inner in value]
    if isinstance(value, dict):
        return {name: _decoded(inner, depth + 1) for name, inner in value.items()}
    return value
