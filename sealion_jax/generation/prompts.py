"""What a model is asked, as token ids: texts, and rows of a file of conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sealion_jax.data import files
from sealion_jax.data.chat.conversation import Conversation, RowError, UserTurn
from sealion_jax.data.chat.rendering import render_prompt
from sealion_jax.data.chat.rows import prompt_from_fields
from sealion_jax.data.inputs.rows import FieldNames, Record, Skipped
from sealion_jax.data.inputs.text_files import Position, read_lines
from sealion_jax.errors import UserError
from sealion_jax.generation.config import Format
from sealion_jax.tokenizer import Tokenizer

Fields = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rows become prompts.

    Attributes:
        system: the system text of chats that have none of their own.
        drop_last_answer: an answer that ends a conversation is left out, to be written anew.
    """

    format: Format
    system: str = ""
    drop_last_answer: bool = False

    def __post_init__(self) -> None:
        if self.system and self.format == "raw":
            raise UserError("a system text is part of a chat; leave it out, or choose the format chat")
        if self.drop_last_answer and self.format == "raw":
            raise UserError("only a chat has a last answer to drop; choose the format chat")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row that is to be answered.

    Attributes:
        number: of the row in its file, from 0: what draws depend on beside the seed.
        ids: of the prompt.
    """

    number: int
    fields: Fields
    ids: Sequence[int]


def read_rows(path: str) -> Iterator[Record | Skipped]:
    """The rows of a JSONL file (also .gz or .zst), and those that are none.

    Raises:
        UserError: no such file, or one that is cut short.
    """
    if not files.exists(path):
        raise UserError(f"there is no file {path}; give a JSONL file of rows with `prompt` or `messages`")
    for chunk in read_lines(path, plain=False, start=Position()):
        yield from chunk.records(FieldNames())


def questions(
    rows: Iterable[Record | Skipped],
    tokenizer: Tokenizer,
    asking: Asking,
    *,
    source: str,
    max_new_tokens: int,
    max_context_tokens: int,
    tell: Callable[[str], None],
) -> list[Question]:
    """The rows that can be answered; the others are told, each with its line.

    Args:
        source: what stands before a line's number in messages: "chats.jsonl:".

    Raises:
        UserError: none can be answered.
    """
    found = []
    for row in rows:
        where = f"{source}{row.line}"
        if isinstance(row, Skipped):
            tell(f"{where}: skipped, {row.reason}: {row.detail}")
            continue
        try:
            ids = prompt_ids(row.fields, tokenizer, asking)
        except RowError as error:
            tell(f"{where}: skipped, {error}")
            continue
        if len(ids) + max_new_tokens > max_context_tokens:
            tell(
                f"{where}: skipped, too_long: its {len(ids)} tokens and --max-new-tokens {max_new_tokens} "
                f"are more than the model's context of {max_context_tokens}"
            )
            continue
        found.append(Question(number=row.line - 1, fields=row.fields, ids=ids))
    if not found:
        raise UserError(f"{source.rstrip(': ')}: there is nothing that can be answered")
    return found


def prompt_ids(fields: Fields, tokenizer: Tokenizer, asking: Asking) -> list[int]:
    """The tokens of a row's prompt, ready to be answered.

    Raises:
        RowError: the row has none, or it has been answered already.
        UserError: the tokenizer cannot do the chat format.
    """
    if asking.format == "raw":
        return raw_ids(_text(fields), tokenizer)
    conversation = prompt_from_fields(_without_last_answer(fields) if asking.drop_last_answer else fields)
    if asking.system and not conversation.system:
        conversation = replace(conversation, system=asking.system.strip())
    return chat_ids(conversation, tokenizer)


def chat_ids(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation that waits for its answer."""
    return render_prompt(conversation, tokenizer).tolist()


def raw_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """<bos> and the tokens of a text that is to be continued."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def text_prompt_ids(text: str, tokenizer: Tokenizer, asking: Asking) -> list[int]:
    """The tokens of a text: continued as it is, or a user's message to be answered."""
    if asking.format == "raw":
        return raw_ids(text, tokenizer)
    turn = UserTurn(text=text.strip())
    return chat_ids(Conversation(turns=(turn,), system=asking.system.strip()), tokenizer)


def _text(fields: Fields) -> str:
    text = fields.get("prompt")
    if not isinstance(text, str):
        raise RowError("bad_shape", "no `prompt` that is a string, which is all that the format raw reads")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("lone_surrogate", f"prompt, at character {error.start}") from None
    return text


def _without_last_answer(fields: Fields) -> Fields:
    name = "messages" if fields.get("messages") is not None else "prompt"
    messages = fields.get(name)
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1].get("role")
        return {**fields, name: messages[:-1]} if last == "assistant" else fields
    return fields
