"""The corpus in the package, made ready to train on: tokenizer, token stores, and what is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.files import user_cache
from sealion_jax.data.store.writer import write_chat_store, write_store
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 4096
HELD_OUT_ROWS = 2
Part = Literal["texts", "chats", "pairs"]
PARTS: tuple[Part, ...] = get_args(Part)
_LAYOUT = 3  # of the cached folder; another one is made when this, the corpus or the settings change


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedPart:
    """Texts, chats or pairs. The keys are language codes, in alphabetical order.

    Attributes:
        stores: a token store of each language's rows but the last two.
        heldout: a JSONL file of each language's last two rows.
        all_heldout: a JSONL file of all of them.
    """

    stores: dict[str, Path]
    heldout: dict[str, Path]
    all_heldout: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedCorpus:
    """Where the prepared corpus is.

    Attributes:
        tokenizer: the SentencePiece model, with Gemma 3's id layout; trained on the texts that are not held
            out.
        vocab_size: its number of pieces.
    """

    tokenizer: Path
    vocab_size: int
    texts: EmbeddedPart
    chats: EmbeddedPart
    pairs: EmbeddedPart


def embedded(*, cache: Path | None = None) -> EmbeddedCorpus:
    """The prepared corpus, from `cache` (the user's by default); made there, in a second, the first time.

    Several processes may call this at once: each works aside, and one of the equal results stays.

    Raises:
        UserError: the cache cannot be written.
    """
    corpus: dict[Part, dict[str, bytes]] = {part: _read(part) for part in PARTS}
    digest = hashlib.sha256(json.dumps([_LAYOUT, VOCAB_SIZE, HELD_OUT_ROWS]).encode())
    for part, files in corpus.items():
        for language, content in files.items():
            digest.update(f"\n{part} {language} {len(content)}\n".encode() + content)
    folder = (cache or user_cache()) / f"embedded-{digest.hexdigest()[:16]}"
    if not folder.exists():
        try:
            _make(folder, corpus)
        except OSError as error:
            raise UserError(
                f"cannot make {folder} ({error.strerror}); name a folder that can be written, with room for "
                "a few megabytes, in the environment variable XDG_CACHE_HOME"
            ) from error
    parts = {
        part: EmbeddedPart(
            stores={language: folder / part / "stores" / language for language in files},
            heldout={language: folder / part / "heldout" / f"{language}.jsonl" for language in files},
            all_heldout=folder / part / "all_heldout.jsonl",
        )
        for part, files in corpus.items()
    }
    return EmbeddedCorpus(
        tokenizer=folder / "tokenizer.model",
        vocab_size=VOCAB_SIZE,
        texts=parts["texts"],
        chats=parts["chats"],
        pairs=parts["pairs"],
    )


def _read(part: Part) -> dict[str, bytes]:
    """Each language's JSONL file."""
    files = importlib.resources.files("sealion_jax.data.corpus") / part
    names = sorted(file.name for file in files.iterdir() if file.name.endswith(".jsonl"))
    return {name.removesuffix(".jsonl"): (files / name).read_bytes() for name in names}


def _make(folder: Path, corpus: Mapping[Part, Mapping[str, bytes]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        texts = (
            row["text"] for content in corpus["texts"].values() for row in _rows(content)[:-HELD_OUT_ROWS]
        )
        tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE, path=aside / "tokenizer.model")
        for part, files in corpus.items():
            (aside / part / "heldout").mkdir(parents=True)
            for language, content in files.items():
                _write_store(
                    aside / part / "stores" / language,
                    _rows(content)[:-HELD_OUT_ROWS],
                    part=part,
                    language=language,
                    tokenizer=tokenizer,
                )
                held_out = b"\n".join(content.splitlines()[-HELD_OUT_ROWS:]) + b"\n"
                (aside / part / "heldout" / f"{language}.jsonl").write_bytes(held_out)
                with open(aside / part / "all_heldout.jsonl", "ab") as all_heldout:
                    all_heldout.write(held_out)
        aside.chmod(0o755)
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():  # where it is one, another process was first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_store(
    path: Path, rows: Sequence[dict], *, part: Part, language: str, tokenizer: Tokenizer
) -> None:
    source = f"sealion_jax/data/corpus/{part}/{language}.jsonl"
    if part == "texts":
        write_store(path, [(row["text"], language) for row in rows], tokenizer=tokenizer, source=source)
        return
    read = chat_from_fields if part == "chats" else preference_from_fields
    write_chat_store(path, [(read(row), language) for row in rows], tokenizer=tokenizer, source=source)


def _rows(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]
