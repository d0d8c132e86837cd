"""Answers as rows of a JSONL file that an interrupted command goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sealion_jax.data.chat.conversation import RowError
from sealion_jax.data.chat.format import read_assistant_text
from sealion_jax.data.files import write_whole
from sealion_jax.errors import UserError
from sealion_jax.generation.config import Format
from sealion_jax.generation.generator import Completion
from sealion_jax.generation.loading import reason
from sealion_jax.tokenizer import Tokenizer

ANSWER_FIELDS = ("answer", "tool_calls", "tokens", "stopped")


def answer_fields(completion: Completion, tokenizer: Tokenizer, output_format: Format) -> dict[str, Any]:
    """What a completion adds to its row: answer, tool_calls (where it has such), tokens, stopped."""
    text = tokenizer.decode(completion.text_ids)
    fields: dict[str, Any] = {"answer": text}
    if output_format == "chat":
        fields = _turn_fields(text)
    return {**fields, "tokens": len(completion.ids), "stopped": reason(completion, tokenizer)}


def _turn_fields(text: str) -> dict[str, Any]:
    try:
        turn = read_assistant_text(text)
    except RowError:  # it is blank
        return {"answer": ""}
    if not turn.calls:
        return {"answer": turn.text}
    functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
    calls = [{"type": "function", "function": function} for function in functions]
    return {"answer": turn.text, "tool_calls": calls}


def title(fields: Mapping[str, object]) -> str:
    """What a row asks, in short: its prompt, or its last message that is not the assistant's."""
    asked = fields.get("messages") or fields.get("prompt")
    if isinstance(asked, list):
        asked = [message for message in asked if message.get("role") != "assistant"][-1].get("content")
    return str(asked)


def told(answer: Mapping[str, Any]) -> str:
    """An answer as a person reads it: its text, and a line for each call."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in answer.get("tool_calls", ())]
    return "\n".join(part for part in (answer["answer"], *calls) if part)


class AnswersFile:
    """A JSONL file of answers, and beside it `<file>.options.json`: what they were made with.

    Opened again, it goes on after its last whole row; `count` tells how many there are.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, overwrite: bool) -> None:
        """
        Args:
            options: all that the answers depend on, as JSON.

        Raises:
            UserError: the file was made with other options, or by something else, or cannot be written.
        """
        record = path.with_name(f"{path.name}.options.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if overwrite:
                path.unlink(missing_ok=True)
                record.unlink(missing_ok=True)
            if path.exists():
                _check_same(path, record, options)
            write_whole(record, (json.dumps(options, indent=1, ensure_ascii=False) + "\n").encode())
            self.count = _drop_torn_row(path)
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"cannot write --output {path}: {error.strerror or error}") from error

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, for everyone to read when this returns."""
        lines = b"".join(_line(row) for row in rows)
        self._file.write(lines)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a field that we only carry has half of a UTF-16 pair, which JSON can spell
        return (json.dumps(row) + "\n").encode()


def _check_same(path: Path, record: Path, options: Mapping[str, Any]) -> None:
    """UserError unless the record beside the file says that it was made with these options."""
    try:
        before = json.loads(record.read_bytes())
    except FileNotFoundError:
        before = None
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise UserError(
            f"{path} is there, and no {record.name} that says what made it; choose another --output, or "
            "write over it with --overwrite"
        )
    changed = [name for name in {**before, **options} if before.get(name) != options.get(name)]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r}, now {options.get(name)!r}" for name in changed)
        raise UserError(
            f"{path} has answers that were made otherwise: {told}. Go on with the same options, choose "
            "another --output, or begin anew with --overwrite"
        )


def _drop_torn_row(path: Path) -> int:
    """The number of whole rows in the file, after cutting off a last one that was not written to its end."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content.count(b"\n")
