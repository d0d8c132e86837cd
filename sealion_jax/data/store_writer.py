"""Writes a token store, from the front to the back, so that a killed writer can go on.

All files of an unfinished store only ever grow. A commit flushes them and then records their lengths in
`progress.json`; whoever goes on cuts the files back to those lengths, so what was written after the last
commit leaves no trace, and the result has the bytes of an undisturbed run. The manifest is written last, by
rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt16, UInt32

from sealion_jax.data import files
from sealion_jax.data.growing_file import LOCK, GrowingFile, explain_write_errors, lock_folder
from sealion_jax.data.manifest import LanguageTotals, Manifest, SourceFile, StoredFile, StoreTokenizer
from sealion_jax.data.store_layout import (
    ASIDE_NAME,
    HELD_OUT,
    PROGRESS,
    SHARD_NAME,
    SKIPPED,
    is_writer_file,
    read_progress,
)
from sealion_jax.data.token_store import ARRAY_DTYPES, MANIFEST, TOKEN_DTYPE
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 28  # a gibibyte


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """What became of some consecutive rows of one source: documents for the store, rows held out or skipped.

    `tokens` are the documents one after the other, each `<bos> text <eos>`; the other arrays have one
    element a document. `skipped` and `held_out` are JSON lines.
    """

    rows: int
    tokens: UInt32[np.ndarray, " tokens"]
    lengths: Int64[np.ndarray, " documents"]
    text_bytes: Int64[np.ndarray, " documents"]
    lines: Int64[np.ndarray, " documents"]
    language_names: tuple[str, ...]
    languages: UInt16[np.ndarray, " documents"]
    skip_reasons: tuple[str, ...] = ()
    skipped: bytes = b""
    num_held_out: int = 0
    held_out: bytes = b""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What an unfinished store holds so far. Per language: [documents, tokens, bytes]."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    held_out: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    languages: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    source_rows: dict[int, int] = dataclasses.field(default_factory=dict)
    source_documents: dict[int, int] = dataclasses.field(default_factory=dict)


class StoreWriter:
    """An unfinished store in a local folder; use it as a context manager.

    `position` is the caller's own note of how far it has read, as of the last commit: None at the start.
    """

    def __init__(self, folder: Path, *, job: str, shard_tokens: int = SHARD_TOKENS) -> None:
        """Goes on with what `folder` holds of the same `job`, or starts there.

        Raises:
            UserError: the folder is in use, or holds a finished store, other files, or another job's work.
        """
        self.folder = folder
        self.position: Sequence[int] | None = None
        self._job = job
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
            others = sorted(path.name for path in self.folder.iterdir() if not is_writer_file(path.name))
            if others:
                raise UserError(
                    f"{self.folder} has other files in it ({', '.join(others[:3])}); "
                    "choose an empty output folder"
                )
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
        counts = dict(state["counts"])
        for name in ("source_rows", "source_documents"):
            counts[name] = {int(k): v for k, v in counts.get(name, {}).items()}
        self.counts = Counts(**counts)
        for name in (self._shard_name(), *ARRAY_DTYPES, SKIPPED, HELD_OUT):
            self._files[name] = GrowingFile(self.folder / name, state["lengths"].get(name, 0))
        if self.counts.documents == 0 and self._files["offsets.bin"].length == 0:
            self._append_array("offsets.bin", np.zeros(1))
        for path in self.folder.iterdir():
            is_later_shard = SHARD_NAME.fullmatch(path.name) and path.name > self._shard_name()
            if is_later_shard or ASIDE_NAME.fullmatch(path.name):
                path.unlink()

    def append(self, encoded: EncodedRows, *, source: int) -> None:
        """Adds rows of source number `source`; sources come in order."""
        counts = self.counts
        self._append_tokens(np.ascontiguousarray(encoded.tokens, TOKEN_DTYPE))
        self._append_array("offsets.bin", counts.tokens + np.cumsum(encoded.lengths))
        self._append_array("text_bytes.bin", encoded.text_bytes)
        self._append_array("lines.bin", encoded.lines)
        languages, global_index = dict(counts.languages), []
        for i, name in enumerate(encoded.language_names):
            documents, tokens, size = languages.setdefault(name, [0, 0, 0])
            mine = encoded.languages == i
            languages[name] = [
                documents + int(mine.sum()),
                tokens + int(encoded.lengths[mine].sum()),
                size + int(encoded.text_bytes[mine].sum()),
            ]
            global_index.append(list(languages).index(name))
        if len(languages) > np.iinfo(ARRAY_DTYPES["languages.bin"]).max:
            raise UserError(f"more than {len(languages) - 1} languages; is the language field the right one?")
        self._append_array("languages.bin", np.array(global_index, "<u2")[encoded.languages])
        self._files[SKIPPED].append(encoded.skipped)
        self._files[HELD_OUT].append(encoded.held_out)
        skipped = dict(counts.skipped)
        for reason in encoded.skip_reasons:
            skipped[reason] = skipped.get(reason, 0) + 1
        self.counts = Counts(
            rows=counts.rows + encoded.rows,
            documents=counts.documents + len(encoded.lengths),
            tokens=counts.tokens + len(encoded.tokens),
            held_out=counts.held_out + encoded.num_held_out,
            skipped=skipped,
            languages=languages,
            source_rows=_added(counts.source_rows, source, encoded.rows),
            source_documents=_added(counts.source_documents, source, len(encoded.lengths)),
        )

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
            arrays=tuple(self._files[name].stored() for name in ARRAY_DTYPES),
            held_out_file=held_out,
        )
        self._write(MANIFEST, manifest.to_json())
        if not last.length:
            last.path.unlink()
        for name in (HELD_OUT, PROGRESS, LOCK):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
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


def _added(counts: dict[int, int], key: int, number: int) -> dict[int, int]:
    return {**counts, key: counts.get(key, 0) + number}


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
    names = tuple(dict.fromkeys(language for _, language in pairs))
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text, _ in pairs]
    encoded = EncodedRows(
        rows=len(pairs),
        tokens=np.array([token for document in documents for token in document], TOKEN_DTYPE),
        lengths=np.array([len(document) for document in documents], np.int64),
        text_bytes=np.array([len(text.encode()) for text, _ in pairs], np.int64),
        lines=np.arange(1, len(pairs) + 1),
        language_names=names,
        languages=np.array([names.index(language) for _, language in pairs], np.uint16),
    )
    size = sum(len(text.encode()) for text, _ in pairs)
    described = SourceFile(path=source, format="texts", bytes=size, sha256="", rows=0, documents=0)
    with StoreWriter(Path(path), job="write_store", shard_tokens=shard_tokens) as writer:
        writer.append(encoded, source=0)
        return writer.finish(tokenizer=store_tokenizer(tokenizer), sources=(described,), settings={})


def store_tokenizer(tokenizer: Tokenizer) -> StoreTokenizer:
    """What a store remembers of its tokenizer."""
    return StoreTokenizer(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
