"""A row of some source, and the document in it or the reason why there is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

from sealion_jax.data.chat.conversation import ChatReason
from sealion_jax.data.inputs.kinds import hint
from sealion_jax.errors import UserError

UNDETERMINED = "und"  # what BCP 47 calls a language that nobody named

TextReason = Literal[
    "bad_json",  # not JSON, or not an object
    "not_utf8",  # bytes that are not UTF-8
    "lone_surrogate",  # JSON can spell half of a UTF-16 pair, which no text has
    "no_text",  # the field is not there, or null
    "text_not_a_string",
    "language_not_a_string",
    "empty",  # nothing, or only whitespace
]
SkipReason = TextReason | ChatReason


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
class Record:
    """A row's fields as its file has them; strings may be UTF-8 bytes. `line` is its row there, from 1."""

    fields: Mapping[str, object]
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it stood: `line` is its row in its file, from 1."""

    text: str
    language: str
    id: str | None
    line: int

    @property
    def content(self) -> str:
        return self.text

    @property
    def fields(self) -> Mapping[str, object]:
        """The row's own fields, but for what it is called."""
        return {"text": self.text}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that cannot be used."""

    reason: SkipReason
    line: int
    detail: str = ""


def record_from_json(row: bytes, *, line: int) -> Record | Skipped:
    """The fields of a JSON object."""
    try:
        text = row.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(error, line=line)
    if not text.strip():
        return Skipped(reason="empty", line=line, detail="it is blank")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Skipped(reason="bad_json", line=line, detail=str(error)[:200])
    if not isinstance(fields, dict):
        return Skipped(reason="bad_json", line=line, detail=f"a {type(fields).__name__}, not an object")
    return Record(fields=fields, line=line)


def document_from_fields(fields: Mapping[str, object], names: FieldNames, *, line: int) -> Document | Skipped:
    """The document in a row's fields; strings may come as UTF-8 bytes."""
    if fields.get(names.text) is None:
        present = [name for name, value in fields.items() if value is not None]
        return Skipped(reason="no_text", line=line, detail=f"no field {names.text!r}{hint('text', present)}")
    try:
        text = _decoded(fields[names.text])
        language, name = labels(fields, names)
    except UnicodeDecodeError as error:
        return not_utf8(error, line=line)
    if not isinstance(text, str):
        return Skipped(reason="text_not_a_string", line=line, detail=f"a {type(text).__name__}")
    if not isinstance(language, str):
        return Skipped(reason="language_not_a_string", line=line, detail=f"a {type(language).__name__}")
    if not text.strip():
        return Skipped(reason="empty", line=line, detail="the text is blank")
    return surrogate_in(text, language, name or "", line=line) or Document(
        text=text, language=language, id=name, line=line
    )


def labels(fields: Mapping[str, object], names: FieldNames) -> tuple[object, str | None]:
    """A row's language, which may be no string, and its name; raises UnicodeDecodeError."""
    language: object = names.language
    if language is None:
        language = fields.get(names.language_field) or UNDETERMINED
    name = _decoded(fields.get(names.id))
    return _decoded(language), None if name is None else str(name)


def surrogate_in(*parts: str, line: int) -> Skipped | None:
    """The row skipped for half of a UTF-16 pair in one of its parts, or None."""
    for part in parts:
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            return Skipped(reason="lone_surrogate", line=line, detail=f"at character {error.start}")
    return None


def not_utf8(error: UnicodeDecodeError, *, line: int) -> Skipped:
    """The row skipped for bytes that are not UTF-8."""
    detail = f"byte 0x{error.object[error.start]:02x} at {error.start}: {error.reason}"
    return Skipped(reason="not_utf8", line=line, detail=detail)


def _decoded(value: object) -> object:
    return value.decode("utf-8") if isinstance(value, bytes) else value
