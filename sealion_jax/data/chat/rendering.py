"""Conversations as token ids in Gemma 3's chat format, with the place of every assistant turn.

Nothing is rendered to text and read again: the control tokens are put in by their ids, and the text between
two of them is encoded in one piece. So what a message says is never taken for a control token, and all other
ids are those of the whole text. An assistant turn's words begin behind the newline that follows `model`. That
newline is a token of its own in Gemma 3's vocabulary; it joins no other newline, because texts are stripped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from sealion_jax.data.chat.conversation import AssistantTurn, Conversation, RowError
from sealion_jax.data.chat.format import turn_texts
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

Learn = Literal["assistant", "last_assistant", "everything"]
"""Which tokens of a conversation are learned; see `loss_mask`."""


class TokenSpan(NamedTuple):
    """Tokens [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation's tokens.

    Attributes:
        ids: from <bos> to the newline behind the last turn.
        assistant_spans: of each assistant turn, its words and its <end_of_turn>.
        prompt_spans: so many of them are in the prompt, from which nothing is learned.
    """

    ids: Int32[np.ndarray, " tokens"]
    assistant_spans: tuple[TokenSpan, ...]
    prompt_spans: int = 0

    @property
    def learned_spans(self) -> tuple[TokenSpan, ...]:
        return self.assistant_spans[self.prompt_spans :]


def render_chat(conversation: Conversation, tokenizer: Tokenizer) -> RenderedChat:
    r"""The conversation's tokens.

        <bos> <start_of_turn> user \n Hi <end_of_turn> \n <start_of_turn> model \n Hello <end_of_turn> \n
                                                                                   [------ span ------)

    Raises:
        UserError: the tokenizer is none with Gemma 3's layout.
    """
    return render_chats([conversation], tokenizer)[0]


def render_chats(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> list[RenderedChat]:
    """The tokens of each conversation, as `render_chat` gives them, with all turns encoded in one call.

    Turns of equal text, such as the prompt that two answers share, are encoded once.
    """
    headed = [_headed_texts(conversation) for conversation in conversations]
    texts = list(dict.fromkeys([_NEWLINE, _MODEL_HEADER, *itertools.chain.from_iterable(headed)]))
    ids = dict(zip(texts, tokenizer.encode_arrays(texts), strict=True))
    frame = _Frame(
        bos=np.array([tokenizer.bos_id], np.int32),
        start=np.array([tokenizer.start_of_turn_id], np.int32),
        end=np.concatenate(([tokenizer.end_of_turn_id], ids[_NEWLINE]), dtype=np.int32),
        model_header=ids[_MODEL_HEADER],
    )
    for turn in (turn for turn in texts if turn.startswith(_MODEL_HEADER)):
        _check_header(ids[turn], frame.model_header, tokenizer)
    return [
        _joined(conversation, [ids[text] for text in turns], frame)
        for conversation, turns in zip(conversations, headed, strict=True)
    ]


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> Int32[np.ndarray, " tokens"]:
    """The tokens of a conversation that waits for the assistant, up to `<start_of_turn>model` and a newline.

    Raises:
        RowError: the conversation ends with the assistant.
        UserError: the tokenizer is none with Gemma 3's layout.
    """
    if conversation.ends_with_assistant:
        raise RowError(
            "roles_do_not_alternate", "the assistant has the last turn; a prompt ends with the user's"
        )
    rendered = render_chat(conversation, tokenizer)
    opening = [tokenizer.start_of_turn_id, *tokenizer.encode("model\n")]
    return np.concatenate([rendered.ids, np.array(opening, np.int32)], dtype=np.int32)


def loss_mask(rendered: RenderedChat, *, learn: Learn = "assistant") -> Bool[np.ndarray, " tokens"]:
    r"""Which tokens are learned, that is, predicted from those before them. For a chat of two questions:

                        <bos> (user turn) \n model \n Hello <end> \n (user turn) \n model \n Bye <end> \n
        assistant         .        .      .    .   .    1     1   .       .      .    .   .   1    1   .
        last_assistant    .        .      .    .   .    .     .   .       .      .    .   .   1    1   .
        everything        .        1      1    1   1    1     1   1       1      1    1   1   1    1   1

    Nothing of a prompt (`prompt_spans`) is learned but under `everything`. <bos> never is: it comes first.
    """
    mask = np.zeros(len(rendered.ids), bool)
    if learn == "everything":
        mask[1:] = True
        return mask
    spans = rendered.learned_spans if learn == "assistant" else rendered.learned_spans[-1:]
    for start, stop in spans:
        mask[start:stop] = True
    return mask


_NEWLINE, _MODEL_HEADER, _USER_HEADER = "\n", "model\n", "user\n"


class _Frame(NamedTuple):
    """The tokens around the turns of every conversation."""

    bos: Int32[np.ndarray, " 1"]
    start: Int32[np.ndarray, " 1"]
    end: Int32[np.ndarray, " end"]
    model_header: Int32[np.ndarray, " header"]


def _headed_texts(conversation: Conversation) -> list[str]:
    """The text of each turn behind the name of its role."""
    return [
        (_MODEL_HEADER if isinstance(turn, AssistantTurn) else _USER_HEADER) + text
        for turn, text in zip(conversation.turns, turn_texts(conversation), strict=True)
    ]


def _joined(
    conversation: Conversation, turns: Sequence[Int32[np.ndarray, " tokens"]], frame: _Frame
) -> RenderedChat:
    is_assistant = [isinstance(turn, AssistantTurn) for turn in conversation.turns]
    pieces, spans, position = [frame.bos], [], 1
    for ids, flag in zip(turns, is_assistant, strict=True):
        pieces += [frame.start, ids, frame.end]
        if flag:
            first = position + len(frame.start) + len(frame.model_header)
            spans.append(TokenSpan(first, position + len(frame.start) + len(ids) + 1))
        position += len(frame.start) + len(ids) + len(frame.end)
    return RenderedChat(
        ids=np.concatenate(pieces, dtype=np.int32),
        assistant_spans=tuple(spans),
        prompt_spans=sum(is_assistant[: conversation.prompt_turns]),
    )


def _check_header(ids: np.ndarray, header: np.ndarray, tokenizer: Tokenizer) -> None:
    if not np.array_equal(ids[: len(header)], header):
        raise UserError(
            f"this tokenizer cuts 'model', a newline and text into {tokenizer.pieces(ids[:4])}, where the "
            "newline is no piece of its own; use one with Gemma 3's layout"
        )
