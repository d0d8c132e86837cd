"""Texts, conversations and pairs of them as the tokens and numbers that a store keeps."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from sealion_jax.data.chat.conversation import Conversation, Preference
from sealion_jax.data.chat.format import learned_bytes
from sealion_jax.data.chat.rendering import render_chats
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.data.store.encoded_rows import EncodedRows, refuse_too_many_languages
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.data.store.token_store import LEARNED_BIT, TOKEN_DTYPE
from sealion_jax.tokenizer import Tokenizer

_NO_TOKENS = np.zeros(0, TOKEN_DTYPE)


def kind_settings(kind: StoreKind) -> dict[str, object]:
    """What a store's settings say of its kind: chats in another format make another store."""
    if kind == "text":
        return {}
    return {"kind": kind, "chat_format": hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()}


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, *, lines: Sequence[int], languages: Sequence[str]
) -> EncodedRows:
    """The rows of texts that stood on these lines; UserError for too many languages."""
    names, indices = _indexed(languages)
    ids = tokenizer.encode_arrays(texts)
    bos, eos = np.array([tokenizer.bos_id], TOKEN_DTYPE), np.array([tokenizer.eos_id], TOKEN_DTYPE)
    pieces = [piece for document in ids for piece in (bos, document, eos)]
    return EncodedRows(
        rows=len(texts),
        tokens=np.concatenate([_NO_TOKENS, *pieces], dtype=TOKEN_DTYPE, casting="unsafe"),
        lengths=np.array([len(document) + 2 for document in ids], np.int64),
        text_bytes=np.array([len(text.encode()) for text in texts], np.int64),
        lines=np.array(lines, np.int64),
        language_names=names,
        languages=indices,
    )


def encode_chats(
    chats: Sequence[Conversation], tokenizer: Tokenizer, *, lines: Sequence[int], languages: Sequence[str]
) -> EncodedRows:
    """The rows of conversations, what is learned of them marked; UserError for too many languages."""
    names, indices = _indexed(languages)
    rendered = render_chats(chats, tokenizer)
    tokens = np.concatenate(
        [_NO_TOKENS, *(chat.ids for chat in rendered)], dtype=TOKEN_DTYPE, casting="unsafe"
    )
    begin = 0
    for chat in rendered:
        for start, stop in chat.learned_spans:
            tokens[begin + start : begin + stop] |= LEARNED_BIT
        begin += len(chat.ids)
    return EncodedRows(
        rows=len(chats),
        tokens=tokens,
        lengths=np.array([len(chat.ids) for chat in rendered], np.int64),
        text_bytes=np.array([learned_bytes(chat) for chat in chats], np.int64),
        lines=np.array(lines, np.int64),
        language_names=names,
        languages=indices,
        learned_start=np.array([chat.learned_spans[0].start for chat in rendered], np.int32),
        learned_stop=np.array([chat.learned_spans[-1].stop for chat in rendered], np.int32),
    )


def encode_pairs(
    pairs: Sequence[Preference], tokenizer: Tokenizer, *, lines: Sequence[int], languages: Sequence[str]
) -> EncodedRows:
    """The rows of pairs: two documents each, the chosen conversation first."""
    encoded = encode_chats(
        [side for pair in pairs for side in (pair.chosen, pair.rejected)],
        tokenizer,
        lines=[line for line in lines for _ in range(2)],
        languages=[language for language in languages for _ in range(2)],
    )
    return dataclasses.replace(encoded, rows=len(pairs))


def _indexed(languages: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The languages in the order of their first appearance, and each document's index into them."""
    names = tuple(dict.fromkeys(languages))
    refuse_too_many_languages(len(names))
    index = {language: i for i, language in enumerate(names)}
    return names, np.array([index[language] for language in languages], np.uint16)
