"""Rows of chats and pairs for a tiny model, and log-probabilities of one conversation at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sealion_jax.data.chat.rendering import render_chat
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.tokenizer import Tokenizer

WEATHER = {"name": "cuaca", "parameters": {"type": "object"}}
CALL = {"function": {"name": "cuaca", "arguments": {"kota": "Medan"}}}


def said(*texts: str) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


# Each with the number of assistant turns that are given, from which nothing is scored.
CHATS: list[tuple[dict[str, Any], int]] = [
    ({"messages": said("Hi", "Ya"), "lang": "id", "id": "short"}, 0),
    ({"messages": said("Beras?", "23 kilo", "Lagi?", "14 besok", "Terima"), "lang": "id"}, 0),
    ({"prompt": "ตลาด", "completion": "เปิดตั้งแต่ก่อนฟ้าสว่าง", "lang": "th"}, 0),
    ({"prompt": said("a", "bumi", "b"), "completion": [{"role": "assistant", "content": "laut"}]}, 1),
    ({"messages": said("The river is wide and slow where it meets the sea. " * 9, "Yes"), "lang": "en"}, 0),
    ({"messages": said("Why?", "மழை பெய்தால் ஆறு நிறையும். " * 5, "And?", "No."), "lang": "ta"}, 0),
    (
        {
            "messages": [
                {"role": "system", "content": "Singkat."},
                *said("Hujan?"),
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": '{"hujan": true}'},
                {"role": "assistant", "content": "Ya, é hujan."},
            ],
            "tools": [WEATHER],
            "lang": "id",
        },
        0,
    ),
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Ya", "rejected": "No, no", "lang": "id", "id": "p0"},
    {"prompt": "Beras?", "chosen": "23 kilo beras di pasar", "rejected": "Ibu", "lang": "id", "id": "p1"},
    {"prompt": said("a", "b", "c"), "chosen": "laut " * 30, "rejected": "bumi", "lang": "id", "id": "p2"},
    {"prompt": "Mùa mưa", "chosen": "đến sớm", "rejected": "mọi năm", "lang": "vi", "id": "p3"},
    {"prompt": "Năm nay? " * 20, "chosen": "Mưa", "rejected": "Sớm hơn", "lang": "vi", "id": "p4"},
    {"prompt": "x", "chosen": "y", "rejected": "z", "lang": "vi", "id": "p5"},
]


def chat_tokens(tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each of CHATS."""
    return [render_chat(chat_from_fields(row), tokenizer).ids for row, _ in CHATS]


def pair_tokens(tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of the chosen and the rejected conversation of each of PAIRS."""
    pairs = [preference_from_fields(row) for row in PAIRS]
    return [(render_chat(x.chosen, tokenizer).ids, render_chat(x.rejected, tokenizer).ids) for x in pairs]


def given_turns(row: Mapping[str, Any]) -> int:
    """The assistant's turns in a row's prompt."""
    prompt = row["prompt"]
    return 0 if isinstance(prompt, str) else sum(message["role"] == "assistant" for message in prompt)


def assistant_spans(ids: np.ndarray, tokenizer: Tokenizer) -> list[range]:
    """Where the assistant's words and <end_of_turn> are, read off the control tokens and the roles' names."""
    (newline,) = tokenizer.encode("\n")
    spans = []
    for start in np.flatnonzero(ids == tokenizer.start_of_turn_id):
        words = start + int(np.flatnonzero(ids[start:] == newline)[0]) + 1
        stop = start + int(np.flatnonzero(ids[start:] == tokenizer.end_of_turn_id)[0]) + 1
        if tokenizer.decode(ids[start + 1 : words]) == "model\n":
            spans.append(range(words, stop))
    return spans


def said_bytes(ids: np.ndarray, spans: Sequence[range], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the words in those spans."""
    return sum(len(tokenizer.decode(ids[span.start : span.stop - 1]).encode()) for span in spans)


class Dense:
    """Log-probabilities from all logits of a conversation that is alone in its row, in float64."""

    def __init__(self, bind: Callable[[Any], Gemma3], *, context: int) -> None:
        self._context = context

        @jax.jit
        def logits(params: Any, tokens: jax.Array) -> jax.Array:
            model = bind(params)
            positions = jnp.arange(context, dtype=jnp.int32)[None]
            return model.logits(model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens)))[0]

        self._logits = logits

    def nats(self, params: Any, ids: np.ndarray, where: Sequence[int]) -> float:
        """Of the tokens at these places, each predicted from the window that scores it."""
        starts = {place: self._start(place) for place in where}
        tables = {start: self._log_probs(params, ids, start) for start in set(starts.values())}
        return -sum(tables[start][place - start - 1, ids[place]] for place, start in starts.items())

    def _start(self, place: int) -> int:
        """Where the window begins that scores a place, in closed form: the first has a context of new tokens,
        each later one as many less by half a context."""
        half = self._context // 2
        later = math.ceil(max(0, place - self._context) / (self._context - half))
        return later and self._context + (later - 1) * (self._context - half) - half

    def _log_probs(self, params: Any, ids: np.ndarray, start: int) -> np.ndarray:
        """[context, V]: what follows each token of the window; padding behind it is never looked at."""
        window = np.concatenate([ids[:1], ids[start + 1 : start + self._context]])
        tokens = np.zeros((1, self._context), np.int32)
        tokens[0, : len(window)] = window
        logits = np.asarray(self._logits(params, tokens), np.float64)
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
