"""Documents as one long row of token ids on disk, read by position.

A store is a directory:

    manifest.json       totals, sources, tokenizer, and the size and sha256 of every other file; written last
    tokens-00000.bin    token ids, uint32 little-endian; every shard but the last holds manifest.shard_tokens
    tokens-00001.bin    ...
    offsets.bin         int64 little-endian, documents + 1: document d is tokens [offsets[d], offsets[d + 1])
    languages.bin       uint16 little-endian: document d's index into manifest.languages
    text_bytes.bin      int64 little-endian: document d's bytes of UTF-8 text
    lines.bin           int64 little-endian: document d's row in its source file, from 1
    learned_start.bin   int32 little-endian, not for texts: where in document d the first learned token is
    learned_stop.bin    int32 little-endian, not for texts: the index behind its last learned token
    skipped.jsonl       one row for each input row that could not be used: file, line, reason
    references/         for pairs: what reference models gave them (references.py); not in the manifest

manifest.kind says what a document is:

    text     `<bos> text <eos>`
    chats    a conversation, from <bos> to the newline behind its last turn; no <eos> follows
    pairs    the same; document 2k is the chosen conversation of a pair, 2k + 1 the rejected one

In chats and pairs bit 31 of a token, `LEARNED_BIT`, marks what may be learned: the assistant's words and the
<end_of_turn> behind them, but nothing of a prompt. `text_bytes` are then the bytes of those words. Texts have
no marks. A directory without manifest.json is not a store (yet).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Callable

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32, Int64, UInt16, UInt32

from sealion_jax.data import files
from sealion_jax.data.store.cache import CacheConfig, CachedFile, Room
from sealion_jax.data.store.manifest import Manifest, StoredFile, StoreKind
from sealion_jax.errors import UserError

MANIFEST = "manifest.json"
TOKEN_DTYPE = np.dtype("<u4")
ARRAY_DTYPES = {
    "offsets.bin": np.dtype("<i8"),
    "languages.bin": np.dtype("<u2"),
    "text_bytes.bin": np.dtype("<i8"),
    "lines.bin": np.dtype("<i8"),
    "learned_start.bin": np.dtype("<i4"),
    "learned_stop.bin": np.dtype("<i4"),
}
LEARNED_ARRAYS = ("learned_start.bin", "learned_stop.bin")
LEARNED_BIT = 1 << 31
_ARRAY_BLOCK_BYTES = 64 << 20  # arrays are read whole


def array_names(kind: StoreKind) -> tuple[str, ...]:
    """The arrays that a store of this kind has."""
    return tuple(name for name in ARRAY_DTYPES if kind != "text" or name not in LEARNED_ARRAYS)


class TokenStore:
    """A finished token store, open for reading. Threads may share it; it travels to a process as its path."""

    def __init__(self, path: str, manifest: Manifest, *, cache: CacheConfig) -> None:
        self.path = path
        self.manifest = manifest
        self._cache = cache
        self._room = Room(cache)
        self._readers: list[Callable[[int, int], np.ndarray]] = [
            self._reader(shard) for shard in manifest.shards
        ]

    @classmethod
    def open(cls, path: epath.PathLike, *, cache: CacheConfig | None = None) -> TokenStore:
        """The store at `path`, local or gs://, after a check that its files are all there and of their size.

        Args:
            path: the store's directory.
            cache: where blocks of a remote store are kept; by default the user's cache.

        Raises:
            UserError: no finished store is there, or a file is missing or has another size; it is named.
        """
        folder = str(path).rstrip("/")
        where = files.join(folder, MANIFEST)
        try:
            manifest = Manifest.from_json(files.read_bytes(where), where)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} is not a finished token store: it has no {MANIFEST}; "
                "make one with python -m sealion_jax.prepare, or run an interrupted prepare again"
            ) from None
        problems = _size_problems(folder, manifest)
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                f"token store {folder} is not whole: {'; '.join(problems[:3])}{more}; "
                "copy it again or run prepare again"
            )
        return cls(folder, manifest, cache=cache or CacheConfig())

    def __reduce__(self) -> tuple[Callable[..., TokenStore], tuple[str, Manifest, CacheConfig]]:
        return _reopen, (self.path, self.manifest, self._cache)

    @property
    def kind(self) -> StoreKind:
        """What its documents are: text, chats or pairs."""
        return self.manifest.kind

    @property
    def num_tokens(self) -> int:
        return self.manifest.tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    @property
    def language_names(self) -> tuple[str, ...]:
        return tuple(totals.language for totals in self.manifest.languages)

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " documents+1"]:
        """Document d is tokens [offsets[d], offsets[d + 1])."""
        return self._array("offsets.bin")

    @functools.cached_property
    def languages(self) -> UInt16[np.ndarray, " documents"]:
        """Each document's index into `language_names`."""
        return self._array("languages.bin")

    @functools.cached_property
    def text_bytes(self) -> Int64[np.ndarray, " documents"]:
        """Each document's bytes of the text in UTF-8; of a conversation, of what is learned of it."""
        return self._array("text_bytes.bin")

    @functools.cached_property
    def learned_start(self) -> Int32[np.ndarray, " documents"]:
        """The index in each document of its first learned token; ValueError for a store of texts."""
        return self._array("learned_start.bin")

    @functools.cached_property
    def learned_stop(self) -> Int32[np.ndarray, " documents"]:
        """The index in each document behind its last learned token; ValueError for a store of texts."""
        return self._array("learned_stop.bin")

    def read(self, start: int, stop: int) -> UInt32[np.ndarray, " tokens"]:
        """Tokens [start, stop) of the whole store, with `LEARNED_BIT` in those of chats and pairs.

        They are not to be written to. ValueError outside the store.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"tokens [{start}, {stop}) are not inside {self.path} of {self.num_tokens} tokens"
            )
        size = self.manifest.shard_tokens
        shard, first = divmod(start, size)
        if stop <= (shard + 1) * size and start < stop:
            return self._readers[shard](first, stop - shard * size)
        parts = []
        while start < stop:
            shard, first = divmod(start, size)
            last = min(size, stop - shard * size)
            parts.append(self._readers[shard](first, last))
            start += last - first
        return np.concatenate(parts) if parts else np.zeros(0, TOKEN_DTYPE)

    def document(self, index: int) -> UInt32[np.ndarray, " tokens"]:
        """Tokens of one document, as `read` gives them."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def document_with_mask(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """The ids of one document, and which of them are marked as learned: of a text, none."""
        tokens = self.document(index)
        return (tokens & (LEARNED_BIT - 1)).astype(np.int32), tokens >= LEARNED_BIT

    def origin(self, index: int) -> tuple[str, int]:
        """Where a document came from: its source file, and its row there, from 1 (a line, in a text file)."""
        ends = np.cumsum([source.documents for source in self.manifest.sources])
        source = bisect.bisect_right(ends, index)
        return self.manifest.sources[source].path, int(self._array("lines.bin")[index])

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError unless the store was made with the tokenizer of this fingerprint."""
        mine = self.manifest.tokenizer.fingerprint
        if mine != fingerprint:
            raise UserError(
                f"token store {self.path} was made with another tokenizer (sha256 {mine[:12]}, not "
                f"{fingerprint[:12]}); name the tokenizer it was made with, or prepare the store again"
            )

    def verify(self) -> list[str]:
        """What is wrong with the files' bytes, one line each, empty when all hashes fit. Reads everything."""
        problems = _size_problems(self.path, self.manifest)
        return problems or [
            f"{file.name} has other bytes than its manifest says"
            for file in (*self.manifest.shards, *self.manifest.arrays)
            if sha256_of(files.join(self.path, file.name)) != file.sha256
        ]

    def _array(self, name: str) -> np.ndarray:
        if name not in array_names(self.kind):
            raise ValueError(f"{self.path} is a store of texts, which has no {name}: nothing in it is marked")
        path = files.join(self.path, name)
        if files.is_remote(path):
            (stored,) = (array for array in self.manifest.arrays if array.name == name)
            content = CachedFile(path, stored, self._room, block_bytes=_ARRAY_BLOCK_BYTES).read_all()
            return np.frombuffer(content, ARRAY_DTYPES[name])
        return _map(path, ARRAY_DTYPES[name])

    def _reader(self, shard: StoredFile) -> Callable[[int, int], np.ndarray]:
        path = files.join(self.path, shard.name)
        if not files.is_remote(path):
            tokens = _map(path, TOKEN_DTYPE)
            return lambda start, stop: tokens[start:stop]
        blocks = CachedFile(path, shard, self._room)
        return lambda start, stop: np.frombuffer(blocks.read(4 * start, 4 * stop), TOKEN_DTYPE)


def _reopen(path: str, manifest: Manifest, cache: CacheConfig) -> TokenStore:
    return TokenStore(path, manifest, cache=cache)


def _map(path: str, dtype: np.dtype) -> np.ndarray:
    # A plain view: slicing np.memmap itself costs microseconds. An empty file cannot be mapped.
    if files.size(path) == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _size_problems(folder: str, manifest: Manifest) -> list[str]:
    found = files.sizes(folder)
    problems = []
    for file in (*manifest.shards, *manifest.arrays):
        if file.name not in found:
            problems.append(f"{file.name} is missing")
        elif found[file.name] != file.bytes:
            problems.append(f"{file.name} has {found[file.name]} bytes instead of {file.bytes}")
    return problems


def sha256_of(path: str) -> str:
    """sha256 of a file's bytes, in hex, read in pieces."""
    digest = hashlib.sha256()
    with files.open_binary(path) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
