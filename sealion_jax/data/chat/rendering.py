"""Conversations as token ids in Gemma 3's chat format, with the place of every assistant turn.

Nothing is rendered to text and read again: the control tokens are put in by their ids, and the text between
two of them is encoded in one piece. So what a message says is never taken for a control token, and all other
ids are those of the whole text. An assistant turn's words begin behind the newline that follows `model`. That
newline is a token of its own in Gemma 3's vocabulary; it joins no other newline, because texts are stripped.
"""

from __future__ import annotations

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
    texts = turn_texts(conversation)
    is_assistant = [isinstance(turn, AssistantTurn) for turn in conversation.turns]
    headers = ["model\n" if flag else "user\n" for flag in is_assistant]
    newline, model_header, *turns = tokenizer.encode_arrays(
        ["\n", "model\n", *(header + text for header, text in zip(headers, texts, strict=True))]
    )
    start = np.array([tokenizer.start_of_turn_id], np.int32)
    end = np.concatenate(([tokenizer.end_of_turn_id], newline), dtype=np.int32)
    pieces, spans, position = [np.array([tokenizer.bos_id], np.int32)], [], 1
    for ids, flag in zip(turns, is_assistant, strict=True):
        pieces += [start, ids, end]
        if flag:
            _check_header(ids, model_header, tokenizer)
            first = position + len(start) + len(model_header)
            spans.append(TokenSpan(first, position + len(start) + len(ids) + 1))
        position += len(start) + len(ids) + len(end)
    return RenderedChat(
        ids=np.concatenate(pieces, dtype=np.int32),
        assistant_spans=tuple(spans),
        prompt_spans=sum(is_assistant[: conversation.prompt_turns]),
    )


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


def _check_header(ids: np.ndarray, header: np.ndarray, tokenizer: Tokenizer) -> None:
    if not np.array_equal(ids[: len(header)], header):
        raise UserError(
            f"this tokenizer cuts 'model', a newline and text into {tokenizer.pieces(ids[:4])}, where the "
            "newline is no piece of its own; use one with Gemma 3's layout"
        )
