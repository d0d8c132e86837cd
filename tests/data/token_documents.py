"""Small token stores made of given token ids, for tests of what reads stores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sealion_jax.data.store.manifest import SourceFile, StoreTokenizer
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import EncodedRows, StoreWriter

BOS, EOS = 2, 1


def store_of(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    languages: Sequence[str] | None = None,
    shard_tokens: int = 1 << 20,
    fingerprint: str = "f" * 64,
) -> TokenStore:
    """The store of documents given as ids of their text; <bos> and <eos> are put around each."""
    languages = languages or ["und"] * len(documents)
    names = tuple(dict.fromkeys(languages))
    whole = [[BOS, *text, EOS] for text in documents]
    encoded = EncodedRows(
        rows=len(whole),
        tokens=np.array([token for document in whole for token in document], np.uint32),
        lengths=np.array([len(document) for document in whole], np.int64),
        text_bytes=np.array([3 * len(text) for text in documents], np.int64),
        lines=np.arange(1, len(whole) + 1),
        language_names=names,
        languages=np.array([names.index(language) for language in languages], np.uint16),
    )
    source = SourceFile(path="given.jsonl", format="jsonl", bytes=0, sha256="", rows=0, documents=0)
    tokenizer = StoreTokenizer(fingerprint=fingerprint, vocab_size=1 << 16, bos_id=BOS, eos_id=EOS)
    with StoreWriter(folder, job="tests", shard_tokens=shard_tokens) as writer:
        writer.append(encoded, source=0)
        writer.finish(tokenizer=tokenizer, sources=(source,), settings={})
    return TokenStore.open(folder)


def distinct_documents(lengths: Sequence[int], *, first: int = 1000) -> list[list[int]]:
    """Texts of the given lengths in which no token id occurs twice."""
    ends = first + np.cumsum([0, *lengths])
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)]
