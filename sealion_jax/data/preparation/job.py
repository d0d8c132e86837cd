"""What `prepare` is asked to make: the inputs, how they are read, and what decides a store's content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sealion_jax.data.inputs.sources import ReadOptions, Source
from sealion_jax.data.inputs.text_files import CHUNK_BYTES
from sealion_jax.data.preparation.encoding import HoldOut
from sealion_jax.data.store.documents import kind_settings
from sealion_jax.data.store.manifest import SourceFile
from sealion_jax.data.store.writer import SHARD_TOKENS
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a store is made.

    Attributes:
        read: kind, formats and fields of the inputs.
        hold_out: which documents go to a file instead of the store.
        max_skipped_share: of the rows; more that cannot be used fail the whole.
        strict: fail at the first row that cannot be used.
        workers: processes; None takes one a core this process may use, and fewer for little text.
        shard_tokens: tokens in each of the store's files but the last.
        overwrite: discard what the output holds.
        commit_seconds: at most this much work is lost by a kill.
        work_dir: where a store for a bucket is put together; in the user's cache by default.
    """

    read: ReadOptions = dataclasses.field(default_factory=ReadOptions)
    hold_out: HoldOut | None = None
    max_skipped_share: float = 0.01
    strict: bool = False
    workers: int | None = None
    shard_tokens: int = SHARD_TOKENS
    overwrite: bool = False
    commit_seconds: float = 10.0
    work_dir: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"max_skipped_share is {self.max_skipped_share}; it is a share, from 0 to 1")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers is {self.workers}; it must be at least 1")
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens is {self.shard_tokens}; it must be at least 1")

    def settings(self) -> dict[str, object]:
        """What of this decides the store's content."""
        hold_out = self.hold_out and {"share": self.hold_out.share, "seed": self.hold_out.seed}
        read = dataclasses.asdict(self.read)
        del read["kind"]  # it is in the settings of its own, which those of texts are without
        return {
            "read": read,
            "hold_out": hold_out,
            "shard_tokens": self.shard_tokens,
            **kind_settings(self.read.kind),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides what a store will hold."""

    tokenizer: Tokenizer
    options: PrepareOptions
    sources: tuple[Source, ...]
    described: tuple[SourceFile, ...]

    def key(self) -> str:
        """Equal for two jobs that make the same store."""
        return content_key(self.tokenizer.fingerprint, self.options.settings(), self.described)

    def workers(self) -> int:
        """How many processes to use; one means none but this."""
        work = sum(source.bytes for source in self.described) // CHUNK_BYTES
        # Linux tells which cores this process may use, which in a container or a Slurm step are not all.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.options.workers or max(1, min(cores, work // 2))


def content_key(fingerprint: str, settings: dict[str, object], sources: Sequence[SourceFile]) -> str:
    """Equal for equal content, wherever the inputs are: moving them changes nothing."""
    content = [fingerprint, settings, [(source.format, source.bytes, source.sha256) for source in sources]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_sources(sources: Sequence[Source], on_bytes: Callable[[int], object]) -> tuple[SourceFile, ...]:
    """What each source is, its hash included, so all of it is read; `on_bytes` is told of each piece."""
    lock = threading.Lock()

    def count(amount: int) -> None:
        with lock:
            on_bytes(amount)

    def describe(source: Source) -> SourceFile:
        return SourceFile(
            path=source.path,
            format=source.format,
            bytes=source.size_bytes(),
            sha256=source.sha256(count),
            rows=0,
            documents=0,
        )

    with ThreadPoolExecutor(8) as threads:
        return tuple(threads.map(describe, sources))
