"""Sources into a finished token store: resumable, idempotent, the same bytes for any number of workers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from sealion_jax.data import files
from sealion_jax.data.encoding import EncodingTask, HoldOut, make_encoder
from sealion_jax.data.manifest import Manifest, SourceFile
from sealion_jax.data.remote_store import discard_anywhere, upload
from sealion_jax.data.sources import ReadOptions, Source, find_sources
from sealion_jax.data.store_layout import SKIPPED, read_progress
from sealion_jax.data.store_writer import SHARD_TOKENS, StoreWriter, store_tokenizer
from sealion_jax.data.text_files import CHUNK_BYTES, Position
from sealion_jax.data.token_store import MANIFEST, TokenStore, sha256_of
from sealion_jax.data.workers import ordered_map
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a store is made.

    Attributes:
        read: formats and fields of the inputs.
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
        return {
            "read": dataclasses.asdict(self.read),
            "hold_out": hold_out,
            "shard_tokens": self.shard_tokens,
        }


class Shown(Protocol):
    """Something that shows progress."""

    def update(self, amount: int = 1) -> None: ...


class ShowProgress(Protocol):
    """What starts to show the progress towards a total of bytes, `initial` of which are done."""

    def __call__(
        self, total: int, description: str, /, *, initial: int = 0
    ) -> contextlib.AbstractContextManager[Shown]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A finished store, and whether it was so before."""

    manifest: Manifest
    nothing_to_do: bool


def prepare(
    inputs: Sequence[str],
    output: str,
    *,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    show: ShowProgress,
) -> Prepared:
    """The token store of `inputs` at `output`, made now, or gone on with, or found finished.

    Raises:
        UserError: an input cannot be read or has too many rows that cannot be used; `output` holds
            something else, or is in use; the disk is full.
    """
    sources = find_sources(inputs, options.read)
    _refuse_overlaps(inputs, output, options.hold_out)
    with show(sum(source.size_bytes() for source in sources), "checking the inputs") as shown:
        described = _describe(sources, shown)
    job = _Job(tokenizer=tokenizer, options=options, sources=tuple(sources), described=described)
    output = output.rstrip("/")
    if options.overwrite:
        discard_anywhere(output)
    elif files.exists(files.join(output, MANIFEST)):
        return Prepared(manifest=_finished(output, job), nothing_to_do=True)
    if not files.is_remote(output):
        return Prepared(manifest=_build(Path(output), job, show), nothing_to_do=False)
    name = hashlib.sha256(output.encode()).hexdigest()[:16]
    folder = options.work_dir or files.user_cache() / "prepare" / name
    if not (folder / MANIFEST).exists():
        _build(folder, job, show)
    manifest = _finished(str(folder), job)
    with show(sum(file.bytes for file in (*manifest.shards, *manifest.arrays)), "uploading") as shown:
        upload(folder, output, manifest, shown.update)
    return Prepared(manifest=manifest, nothing_to_do=False)


def _refuse_overlaps(inputs: Sequence[str], output: str, hold_out: HoldOut | None) -> None:
    """UserError when what is written would be read the next time, or would take the place of what is read."""
    written = [output, *([hold_out.file] if hold_out else [])]
    places = [os.path.realpath(path) for path in written if not files.is_remote(path)]
    for name in inputs:
        source = os.path.realpath(name)
        for path in places:
            if path == source or (os.path.isdir(source) and path.startswith(source + os.sep)):
                raise UserError(
                    f"{path} is to be written, and {name} is an input; choose another place for it"
                )
    if len(places) == 2 and os.path.dirname(places[1]) == places[0]:
        raise UserError(f"the held-out documents cannot go into the store {output}; choose another place")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """All that decides what a store will hold."""

    tokenizer: Tokenizer
    options: PrepareOptions
    sources: tuple[Source, ...]
    described: tuple[SourceFile, ...]

    def key(self) -> str:
        """Equal for two jobs that make the same store."""
        return _key(self.tokenizer.fingerprint, self.options.settings(), self.described)

    def workers(self) -> int:
        """How many processes to use; one means none but this."""
        work = sum(source.bytes for source in self.described) // CHUNK_BYTES
        # Linux tells which cores this process may use, which in a container or a Slurm step are not all.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.options.workers or max(1, min(cores, work // 2))


def _key(fingerprint: str, settings: dict[str, object], sources: Sequence[SourceFile]) -> str:
    # Without the paths: moving the inputs changes nothing.
    content = [fingerprint, settings, [(source.format, source.bytes, source.sha256) for source in sources]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(sources: Sequence[Source], shown: Shown) -> tuple[SourceFile, ...]:
    lock = threading.Lock()

    def count(amount: int) -> None:
        with lock:
            shown.update(amount)

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


def _finished(output: str, job: _Job) -> Manifest:
    """The manifest of the finished store at `output`; UserError unless it is this job's, whole."""
    manifest = TokenStore.open(output).manifest
    if _key(manifest.tokenizer.fingerprint, manifest.settings, manifest.sources) != job.key():
        options = job.options.settings()
        differ = "of other inputs"
        if manifest.tokenizer.fingerprint != job.tokenizer.fingerprint:
            differ = "of another tokenizer"
        elif manifest.settings != options:
            wrong = [name for name in options if manifest.settings.get(name) != options[name]]
            differ = f"made with other options ({', '.join(wrong)})"
        raise UserError(
            f"{output} is a finished token store {differ}; choose another output, or add --overwrite"
        )
    held_out, wanted = manifest.held_out_file, job.options.hold_out
    if held_out is None or wanted is None:
        return manifest
    if not files.exists(wanted.file) or sha256_of(wanted.file) != held_out.sha256:
        raise UserError(
            f"{wanted.file} is not the file of held-out documents that belongs to {output} (they are not in "
            "the store); bring it back, or add --overwrite to make both again"
        )
    return manifest


def _build(folder: Path, job: _Job, show: ShowProgress) -> Manifest:
    hold_out = job.options.hold_out
    if hold_out and files.exists(hold_out.file) and not job.options.overwrite and not read_progress(folder):
        raise UserError(
            f"{hold_out.file} is there already; choose another --hold-out-file, or add --overwrite"
        )
    with StoreWriter(folder, job=job.key(), shard_tokens=job.options.shard_tokens) as writer:
        _encode(writer, job, show)
        _refuse_too_many_skipped(writer, job.options)
        if not writer.counts.documents:
            raise UserError(
                f"no document for {folder}: of {writer.counts.rows} rows all were skipped or held out"
            )
        return writer.finish(
            tokenizer=store_tokenizer(job.tokenizer),
            sources=job.described,
            settings=job.options.settings(),
            held_out_file=hold_out.file if hold_out else None,
        )


def _encode(writer: StoreWriter, job: _Job, show: ShowProgress) -> None:
    """Appends all that the writer does not have yet, committing now and then."""
    options = job.options
    arguments = (job.tokenizer.model_bytes, options.read.names, options.hold_out)
    progress = _Progress(*writer.position) if writer.position else _Progress()
    total = sum(source.bytes for source in job.described)
    with show(total, "tokenizing", initial=progress.source_bytes) as shown:
        committed = time.monotonic()
        tasks = _tasks(job, progress)
        for task, encoded in ordered_map(make_encoder, arguments, tasks, workers=job.workers()):
            writer.append(encoded, source=task.source)
            if options.strict:
                _refuse_too_many_skipped(writer, options)
            progress = progress.after(task)
            shown.update(task.chunk.source_bytes)
            if time.monotonic() - committed >= options.commit_seconds:
                writer.commit(progress)
                committed = time.monotonic()
        writer.commit(progress)


class _Progress(NamedTuple):
    """How far the inputs are read: what a writer remembers as its position."""

    source: int = 0
    offset: int = 0
    rows: int = 0
    source_bytes: int = 0

    def after(self, task: EncodingTask) -> _Progress:
        done = self.source_bytes + task.chunk.source_bytes
        return _Progress(task.source, task.chunk.next.offset, task.chunk.next.rows, done)


def _tasks(job: _Job, progress: _Progress) -> Iterator[EncodingTask]:
    start = Position(offset=progress.offset, rows=progress.rows)
    for number in range(progress.source, len(job.sources)):
        source = job.sources[number]
        for chunk in source.chunks(job.options.read, start=start):
            yield EncodingTask(source=number, path=source.path, chunk=chunk)
        start = Position()


def _refuse_too_many_skipped(writer: StoreWriter, options: PrepareOptions) -> None:
    skipped, rows = sum(writer.counts.skipped.values()), writer.counts.rows
    if skipped <= (0 if options.strict else options.max_skipped_share * rows):
        return
    report = writer.folder / SKIPPED
    with open(report, encoding="utf-8") as lines:
        first = json.loads(lines.readline())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(writer.counts.skipped.items()))
    allowed = "none is allowed by --strict"
    if not options.strict:
        allowed = f"--max-skipped-share allows {options.max_skipped_share:.2%} of {rows}"
    raise UserError(
        f"{skipped} rows cannot be used ({reasons}), {allowed}; the first is {first['file']} "
        f"line {first['line']} ({first['reason']}: {first['detail']}), all are in {report}. "
        "Mend them and run again with --overwrite, or allow more"
    )
