"""Writes a token store, from the front to the back, so that a killed writer can go on.

All files of an unfinished store only ever grow. A commit flushes them and then records their lengths in
`progress.json`; whoever goes on cuts the files back to those lengths, so what was written after the last
commit leaves no trace, and the result has the bytes of an undisturbed run. The manifest is written last, by
rename.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sealion_jax.data import files
from sealion_jax.data.chat.conversation import Conversation, Preference
from sealion_jax.data.store.documents import encode_chats, encode_pairs, encode_texts, kind_settings
from sealion_jax.data.store.encoded_rows import Counts, EncodedRows, refuse_too_many_languages
from sealion_jax.data.store.growing_file import GrowingFile, explain_write_errors, lock_folder
from sealion_jax.data.store.layout import (
    ASIDE_NAME,
    HELD_OUT,
    PROGRESS,
    SHARD_NAME,
    SKIPPED,
    is_writer_file,
    read_progress,
    refuse_other_files,
    tidy,
)
from sealion_jax.data.store.manifest import (
    LanguageTotals,
    Manifest,
    SourceFile,
    StoredFile,
    StoreKind,
    StoreTokenizer,
)
from sealion_jax.data.store.token_store import ARRAY_DTYPES, MANIFEST, TOKEN_DTYPE, array_names
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 28  # a gibibyte
Chat = Conversation | Preference


class StoreWriter:
    """An unfinished store in a local folder; use it as a context manager.

    `position` is the caller's own note of how far it has read, as of the last commit: None at the start.
    """

    def __init__(
        self, folder: Path, *, job: str, kind: StoreKind = "text", shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """Goes on with what `folder` holds of the same `job`, or starts there.

        Raises:
            UserError: the folder is in use, or holds a finished store, other files, or another job's work.
        """
        self.folder = folder
        self.position: Sequence[int] | None = None
        self._job = job
        self._kind: StoreKind = kind
        self._shard_tokens = shard_tokens
        self._files: dict[str, GrowingFile] = {}
        self._closed_shards: list[StoredFile] = []
        self._lock = lock_folder(folder)
        try:
            self._go_on_or_start()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._lock.close()

    def _go_on_or_start(self) -> None:
        if (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder} already holds a finished token store; choose another output")
        state = read_progress(self.folder)
        if state is None:
            refuse_other_files(self.folder, known=is_writer_file)
        if state is None or (state["position"] is None and state["job"] != self._job):
            state = {"job": self._job, "position": None, "closed_shards": [], "lengths": {}, "counts": {}}
            # Before any other file is there: whatever is found beside it is known to be a writer's.
            self._write(PROGRESS, json.dumps(state))
        if state["job"] != self._job:
            raise UserError(
                f"{self.folder} holds the unfinished work of another prepare (other inputs, tokenizer or "
                "options); run that one again, choose another output, or add --overwrite to discard it"
            )
        self.position = state["position"]
        self._closed_shards = [StoredFile(**shard) for shard in state["closed_shards"]]
        self.counts = Counts.from_json(state["counts"])
        self._language_index = {name: i for i, name in enumerate(self.counts.languages)}
        for name in (self._shard_name(), *array_names(self._kind), SKIPPED, HELD_OUT):
            self._files[name] = GrowingFile(self.folder / name, state["lengths"].get(name, 0))
        if self.counts.documents == 0 and self._files["offsets.bin"].length == 0:
            self._append_array("offsets.bin", np.zeros(1))
        for path in self.folder.iterdir():
            is_later_shard = SHARD_NAME.fullmatch(path.name) and path.name > self._shard_name()
            is_of_another_kind = path.name in ARRAY_DTYPES and path.name not in self._files
            if is_later_shard or is_of_another_kind or ASIDE_NAME.fullmatch(path.name):
                path.unlink()

    def append(self, encoded: EncodedRows, *, source: int) -> None:
        """Adds rows of source number `source`; sources come in order.

        Raises:
            UserError: there are more languages than there can be, or the disk is full.
            ValueError: they are of another kind than the store.
        """
        if (encoded.learned_start is None) != (self._kind == "text"):
            raise ValueError(f"rows of another kind than the store's, which is {self._kind}")
        for name in encoded.language_names:
            self._language_index.setdefault(name, len(self._language_index))
        refuse_too_many_languages(len(self._language_index))
        indices = np.array([self._language_index[name] for name in encoded.language_names], np.int64)
        self._append_tokens(np.ascontiguousarray(encoded.tokens, TOKEN_DTYPE))
        self._append_array("offsets.bin", self.counts.tokens + np.cumsum(encoded.lengths))
        self._append_array("languages.bin", indices[encoded.languages])
        self._append_array("text_bytes.bin", encoded.text_bytes)
        self._append_array("lines.bin", encoded.lines)
        if encoded.learned_start is not None and encoded.learned_stop is not None:
            self._append_array("learned_start.bin", encoded.learned_start)
            self._append_array("learned_stop.bin", encoded.learned_stop)
        self._files[SKIPPED].append(encoded.skipped)
        self._files[HELD_OUT].append(encoded.held_out)
        self.counts.add(encoded, source=source)

    def commit(self, position: Sequence[int]) -> None:
        """Makes everything so far, and `position`, outlive a kill."""
        for file in self._files.values():
            file.sync()
        self.position = position
        state = {
            "job": self._job,
            "position": position,
            "closed_shards": [dataclasses.asdict(shard) for shard in self._closed_shards],
            "lengths": {name: file.length for name, file in self._files.items()},
            "counts": dataclasses.asdict(self.counts),
        }
        self._write(PROGRESS, json.dumps(state))

    def finish(
        self,
        *,
        tokenizer: StoreTokenizer,
        sources: tuple[SourceFile, ...],
        settings: dict[str, object],
        held_out_file: str | None = None,
    ) -> Manifest:
        """Writes the manifest, which makes the folder a store, and removes what only the writer needed.

        The `rows` and `documents` of `sources` are filled in here. The documents held out go to
        `held_out_file`, before the manifest.
        """
        for file in self._files.values():
            file.sync()
        held_out = None
        if held_out_file is not None:
            with explain_write_errors(held_out_file):
                files.copy_whole(self.folder / HELD_OUT, held_out_file)
            held_out = dataclasses.replace(self._files[HELD_OUT].stored(), name=held_out_file)
        counts, last = self.counts, self._files[self._shard_name()]
        shards = (*self._closed_shards, *((last.stored(),) if last.length else ()))
        manifest = Manifest(
            rows=counts.rows,
            documents=counts.documents,
            tokens=counts.tokens,
            bytes=sum(size for _, _, size in counts.languages.values()),
            held_out=counts.held_out,
            skipped=dict(sorted(counts.skipped.items())),
            languages=tuple(
                LanguageTotals(language=name, documents=documents, tokens=tokens, bytes=size)
                for name, (documents, tokens, size) in counts.languages.items()
            ),
            tokenizer=tokenizer,
            sources=tuple(
                dataclasses.replace(
                    source, rows=counts.source_rows.get(i, 0), documents=counts.source_documents.get(i, 0)
                )
                for i, source in enumerate(sources)
            ),
            settings=settings,
            shard_tokens=self._shard_tokens,
            shards=shards,
            arrays=tuple(self._files[name].stored() for name in array_names(self._kind)),
            held_out_file=held_out,
            kind=self._kind,
        )
        self._write(MANIFEST, manifest.to_json())
        tidy(self.folder, manifest)
        return manifest

    def _write(self, name: str, text: str) -> None:
        with explain_write_errors(self.folder / name):
            files.write_whole(self.folder / name, text.encode())

    def _shard_name(self) -> str:
        return f"tokens-{len(self._closed_shards):05d}.bin"

    def _append_tokens(self, tokens: np.ndarray) -> None:
        while len(tokens):
            shard = self._files[self._shard_name()]
            room = self._shard_tokens - shard.length // TOKEN_DTYPE.itemsize
            shard.append(tokens[:room].tobytes())
            tokens = tokens[room:]
            if shard.length == self._shard_tokens * TOKEN_DTYPE.itemsize:
                shard.sync()
                shard.close()
                del self._files[self._shard_name()]
                self._closed_shards.append(shard.stored())
                self._files[self._shard_name()] = GrowingFile(self.folder / self._shard_name(), 0)

    def _append_array(self, name: str, values: np.ndarray) -> None:
        self._files[name].append(np.ascontiguousarray(values, ARRAY_DTYPES[name]).tobytes())


def write_store(
    path: Path,
    texts: Iterable[str | tuple[str, str]],
    *,
    tokenizer: Tokenizer,
    source: str = "memory",
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """The manifest of a new store of a few texts, each alone or with its language; `prepare` is for more.

    `source` is what `TokenStore.origin` will name.
    """
    pairs = [(text, "und") if isinstance(text, str) else text for text in texts]
    encoded = encode_texts(
        [text for text, _ in pairs],
        tokenizer,
        lines=range(1, len(pairs) + 1),
        languages=[language for _, language in pairs],
    )
    return _write(path, encoded, "text", tokenizer=tokenizer, source=source, shard_tokens=shard_tokens)


def write_chat_store(
    path: Path,
    chats: Iterable[Chat | tuple[Chat, str]],
    *,
    tokenizer: Tokenizer,
    source: str = "memory",
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """The manifest of a new store of a few conversations, or of a few preferences, which make one of pairs.

    Each is given alone or with its language. `source` is what `TokenStore.origin` will name.

    Raises:
        ValueError: conversations and preferences are mixed.
    """
    given = [chat if isinstance(chat, tuple) else (chat, "und") for chat in chats]
    alone = [chat for chat, _ in given if isinstance(chat, Conversation)]
    pairs = [chat for chat, _ in given if isinstance(chat, Preference)]
    if pairs and alone:
        raise ValueError(f"{len(alone)} conversations and {len(pairs)} preferences; make a store of each")
    lines, languages = range(1, len(given) + 1), [language for _, language in given]
    if pairs:
        encoded = encode_pairs(pairs, tokenizer, lines=lines, languages=languages)
    else:
        encoded = encode_chats(alone, tokenizer, lines=lines, languages=languages)
    kind = "pairs" if pairs else "chats"
    return _write(path, encoded, kind, tokenizer=tokenizer, source=source, shard_tokens=shard_tokens)


def _write(
    path: Path,
    encoded: EncodedRows,
    kind: StoreKind,
    *,
    tokenizer: Tokenizer,
    source: str,
    shard_tokens: int,
) -> Manifest:
    described = SourceFile(
        path=source,
        format="texts" if kind == "text" else kind,
        bytes=int(encoded.text_bytes.sum()),
        sha256="",
        rows=0,
        documents=0,
    )
    with StoreWriter(Path(path), job="write_store", kind=kind, shard_tokens=shard_tokens) as writer:
        writer.append(encoded, source=0)
        return writer.finish(
            tokenizer=store_tokenizer(tokenizer), sources=(described,), settings=kind_settings(kind)
        )


def store_tokenizer(tokenizer: Tokenizer) -> StoreTokenizer:
    """What a store remembers of its tokenizer."""
    return StoreTokenizer(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
