"""The corpus in the package, made ready to train on: its tokenizer, its token stores, its held-out texts."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from sealion_jax.data.files import user_cache
from sealion_jax.data.store.writer import write_store
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import train_tokenizer

VOCAB_SIZE = 4096
HELD_OUT_DOCUMENTS = 2
_LAYOUT = 1  # of the cached folder; another one is made when this, the corpus or the settings change


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedCorpus:
    """Where the prepared corpus is. The keys are language codes, in alphabetical order.

    Attributes:
        tokenizer: the SentencePiece model, with Gemma 3's id layout.
        vocab_size: its number of pieces.
        stores: a token store of each language's documents but the last two.
        heldout: a JSONL file of each language's last two documents.
    """

    tokenizer: Path
    vocab_size: int
    stores: dict[str, Path]
    heldout: dict[str, Path]


def embedded(*, cache: Path | None = None) -> EmbeddedCorpus:
    """The prepared corpus, from `cache` (the user's by default); made there, in a second, the first time.

    Several processes may call this at once: each works aside, and one of the equal results stays.

    Raises:
        UserError: the cache cannot be written.
    """
    corpus = _corpus()
    digest = hashlib.sha256(json.dumps([_LAYOUT, VOCAB_SIZE, HELD_OUT_DOCUMENTS]).encode())
    for language, content in corpus.items():
        digest.update(f"\n{language} {len(content)}\n".encode() + content)
    folder = (cache or user_cache()) / f"embedded-{digest.hexdigest()[:16]}"
    if not folder.exists():
        try:
            _make(folder, corpus)
        except OSError as error:
            raise UserError(
                f"cannot make {folder} ({error.strerror}); name a folder that can be written, with room for "
                "a few megabytes, in the environment variable XDG_CACHE_HOME"
            ) from error
    return EmbeddedCorpus(
        tokenizer=folder / "tokenizer.model",
        vocab_size=VOCAB_SIZE,
        stores={language: folder / "stores" / language for language in corpus},
        heldout={language: folder / "heldout" / f"{language}.jsonl" for language in corpus},
    )


def _corpus() -> dict[str, bytes]:
    """Each language's JSONL file."""
    files = importlib.resources.files("sealion_jax.data.corpus")
    names = sorted(file.name for file in files.iterdir() if file.name.endswith(".jsonl"))
    return {name.removesuffix(".jsonl"): (files / name).read_bytes() for name in names}


def _make(folder: Path, corpus: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        lines = {language: content.splitlines() for language, content in corpus.items()}
        train = {language: rows[:-HELD_OUT_DOCUMENTS] for language, rows in lines.items()}
        texts = (text for rows in train.values() for text in _texts(rows))
        tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE, path=aside / "tokenizer.model")
        (aside / "heldout").mkdir()
        for language, rows in lines.items():
            write_store(
                aside / "stores" / language,
                [(text, language) for text in _texts(train[language])],
                tokenizer=tokenizer,
                source=f"sealion_jax/data/corpus/{language}.jsonl",
            )
            held_out = b"\n".join(rows[-HELD_OUT_DOCUMENTS:]) + b"\n"
            (aside / "heldout" / f"{language}.jsonl").write_bytes(held_out)
        aside.chmod(0o755)
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():  # where it is one, another process was first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _texts(rows: Iterable[bytes]) -> list[str]:
    return [json.loads(row)["text"] for row in rows]
