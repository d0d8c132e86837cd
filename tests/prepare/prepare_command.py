"""The command `prepare` run in this process, on a few rows in five scripts, and what it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from sealion_jax import cli, prepare
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.tokenizer import Tokenizer
from tests.tiny_text import SENTENCES

ROWS = [
    {"text": f"{text} {i}\n" * (1 + i % 4), "lang": language, "id": f"{language}{i}"}
    for i in range(60)
    for language, text in SENTENCES.items()
]


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
