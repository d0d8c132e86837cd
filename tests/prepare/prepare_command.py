"""The command `prepare` run in this process, on a few rows of each kind, and what it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sealion_jax import cli, prepare
from sealion_jax.data.chat.rendering import RenderedChat, loss_mask, render_chat
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.tokenizer import Tokenizer
from tests.tiny_text import SENTENCES

ROWS = [
    {"text": f"{text} {i}\n" * (1 + i % 4), "lang": language, "id": f"{language}{i}"}
    for i in range(60)
    for language, text in SENTENCES.items()
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"{text} {i}"},
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": text},
        ][: 2 + 2 * (i % 2)],
        **({"tools": [{"name": f"f{i}", "parameters": {}}]} if i % 3 == 0 else {}),
        "lang": language,
        "id": f"{language}{i}",
    }
    for i in range(60)
    for language, text in SENTENCES.items()
]
# Three pairs of each prompt.
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{text} {i // 3}"}],
        "chosen": f"{text} {i}",
        "rejected": [{"role": "assistant", "content": f"{i} {text}"}],
        "lang": language,
        "id": f"{language}{i}",
    }
    for i in range(60)
    for language, text in SENTENCES.items()
]
ROWS_OF: dict[StoreKind, list[dict]] = {"text": ROWS, "chats": CHATS, "pairs": PAIRS}


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def run(*words: object) -> int:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(prepare.main, [str(word) for word in words])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def texts_of(store: TokenStore, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(store.document(i)[1:-1]), store.language_names[store.languages[i]])
        for i in range(store.num_documents)
    ]


def rendered(rows: list[dict], kind: StoreKind, tokenizer: Tokenizer) -> list[RenderedChat]:
    """The conversations of rows one by one, of pairs the chosen one first."""
    if kind == "chats":
        return [render_chat(chat_from_fields(row), tokenizer) for row in rows]
    pairs = [preference_from_fields(row) for row in rows]
    return [render_chat(side, tokenizer) for pair in pairs for side in (pair.chosen, pair.rejected)]


def check_documents(store: TokenStore, rows: list[dict], tokenizer: Tokenizer) -> None:
    """The store holds these rows and no others, in their order, with what is learned marked."""
    expected = rendered(rows, store.kind, tokenizer)
    assert store.num_documents == len(expected)
    for i, chat in enumerate(expected):
        ids, learned = store.document_with_mask(i)
        assert np.array_equal(ids, chat.ids) and np.array_equal(learned, loss_mask(chat))
        assert store.learned_start[i] == chat.learned_spans[0].start
        assert store.learned_stop[i] == chat.learned_spans[-1].stop
        said = sum(len(tokenizer.decode(ids[a : b - 1]).encode()) for a, b in chat.learned_spans)
        assert store.text_bytes[i] == said
        row = rows[i // 2 if store.kind == "pairs" else i]
        assert store.language_names[store.languages[i]] == row["lang"]
