"""A row of some source, and the document in it or the reason why there is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

from sealion_jax.errors import UserError

UNDETERMINED = "und"  # what BCP 47 calls a language that nobody named

SkipReason = Literal[
    "bad_json",  # not JSON, or not an object
    "not_utf8",  # bytes that are not UTF-8
    "lone_surrogate",  # JSON can spell half of a UTF-16 pair, which no text has
    "no_text",  # the field is not there, or null
    "text_not_a_string",
    "language_not_a_string",
    "empty",  # nothing, or only whitespace
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldNames:
    """Where a row keeps its text, its language and its name; `language` fixes one language for all rows."""

    text: str = "text"
    language_field: str = "lang"
    id: str = "id"
    language: str | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise UserError("the text field's name is empty; name the field that holds the document's text")
        if self.language is not None and not self.language.strip():
            raise UserError("the language is empty; give a code such as id, or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it stood: `line` is its row in its file, from 1."""

    text: str
    language: str
    id: str | None
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that holds no usable document."""

    reason: SkipReason
    line: int
    detail: str = ""


def document_from_json(row: bytes, names: FieldNames, *, line: int) -> Document | Skipped:
    """The document in a JSON object."""
    try:
        text = row.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(reason="not_utf8", line=line, detail=_about(error))
    if not text.strip():
        return Skipped(reason="empty", line=line, detail="it is blank")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Skipped(reason="bad_json", line=line, detail=str(error)[:200])
    if not isinstance(fields, dict):
        return Skipped(reason="bad_json", line=line, detail=f"a {type(fields).__name__}, not an object")
    return document_from_fields(fields, names, line=line)


def document_from_fields(fields: Mapping[str, object], names: FieldNames, *, line: int) -> Document | Skipped:
    """The document in a row's fields; strings may come as UTF-8 bytes."""
    if fields.get(names.text) is None:
        return Skipped(reason="no_text", line=line, detail=f"no field {names.text!r}")
    language: object = names.language
    if language is None:
        language = fields.get(names.language_field) or UNDETERMINED
    try:
        text, language, name = (_decoded(x) for x in (fields[names.text], language, fields.get(names.id)))
    except UnicodeDecodeError as error:
        return Skipped(reason="not_utf8", line=line, detail=_about(error))
    if not isinstance(text, str):
        return Skipped(reason="text_not_a_string", line=line, detail=f"a {type(text).__name__}")
    if not isinstance(language, str):
        return Skipped(reason="language_not_a_string", line=line, detail=f"a {type(language).__name__}")
    return _checked(text, language, None if name is None else str(name), line)


def document_from_text(text: bytes, names: FieldNames, *, line: int) -> Document | Skipped:
    """The document that is the whole of `text`."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(reason="not_utf8", line=line, detail=_about(error))
    return _checked(decoded, names.language or UNDETERMINED, None, line)


def _checked(text: str, language: str, name: str | None, line: int) -> Document | Skipped:
    if not text.strip():
        return Skipped(reason="empty", line=line, detail="the text is blank")
    for part in (text, language, name or ""):
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            return Skipped(reason="lone_surrogate", line=line, detail=f"at character {error.start}")
    return Document(text=text, language=language, id=name, line=line)


def _decoded(value: object) -> object:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _about(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at {error.start}: {error.reason}"
