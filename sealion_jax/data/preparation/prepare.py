"""Sources into a finished token store: resumable, idempotent, the same bytes for any number of workers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from sealion_jax.data import files
from sealion_jax.data.inputs.chunks import Position
from sealion_jax.data.inputs.sources import find_sources
from sealion_jax.data.preparation.encoding import EncodingTask, make_encoder
from sealion_jax.data.preparation.job import Job, PrepareOptions, describe_sources
from sealion_jax.data.preparation.outputs import finished, overwrite, work_folder
from sealion_jax.data.preparation.overlaps import refuse_overlaps
from sealion_jax.data.preparation.workers import ordered_map
from sealion_jax.data.store.layout import SKIPPED, read_progress
from sealion_jax.data.store.manifest import Manifest
from sealion_jax.data.store.remote import drop_copy, upload
from sealion_jax.data.store.token_store import MANIFEST
from sealion_jax.data.store.writer import StoreWriter, store_tokenizer
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer


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
    say: Callable[[str], object] = lambda line: None,
) -> Prepared:
    """The token store of `inputs` at `output`, made now, or gone on with, or found finished.

    Args:
        show: shows progress.
        say: is told, before the work begins, which files in the inputs' folders are not read.

    Raises:
        UserError: an input cannot be read or has too many rows that cannot be used; `output` holds
            something else, or is in use; the disk is full.
    """
    sources = find_sources(inputs, options.read, say=say)
    held_out = options.hold_out.file if options.hold_out else None
    refuse_overlaps(inputs, output, held_out, kind=options.read.kind)
    with show(sum(source.size_bytes() for source in sources), "checking the inputs") as shown:
        described = describe_sources(sources, shown.update)
    job = Job(tokenizer=tokenizer, options=options, sources=tuple(sources), described=described)
    output = output.rstrip("/")
    folder = work_folder(output, options.work_dir)
    if options.overwrite:
        overwrite(output, folder)
    elif files.exists(files.join(output, MANIFEST)):
        manifest = finished(output, job)
        if files.is_remote(output):
            drop_copy(folder, manifest)  # of a prepare that was killed after its upload
        return Prepared(manifest=manifest, nothing_to_do=True)
    if not files.is_remote(output):
        return Prepared(manifest=_build(folder, job, show), nothing_to_do=False)
    if not (folder / MANIFEST).exists():
        _build(folder, job, show)
    manifest = finished(str(folder), job)
    with show(sum(file.bytes for file in (*manifest.shards, *manifest.arrays)), "uploading") as shown:
        upload(folder, output, manifest, shown.update)
    return Prepared(manifest=manifest, nothing_to_do=False)


def _build(folder: Path, job: Job, show: ShowProgress) -> Manifest:
    hold_out = job.options.hold_out
    if hold_out and files.exists(hold_out.file) and not job.options.overwrite and not read_progress(folder):
        raise UserError(
            f"{hold_out.file} is there already; choose another --hold-out-file, or add --overwrite"
        )
    options = job.options
    with StoreWriter(
        folder, job=job.key(), kind=options.read.kind, shard_tokens=options.shard_tokens
    ) as writer:
        _encode(writer, job, show)
        _refuse_too_many_skipped(writer, options)
        if not writer.counts.documents:
            first = f"; {_first_skipped(folder)}" if writer.counts.skipped else ""
            raise UserError(
                f"no document for {folder}: of {writer.counts.rows} rows all were skipped or held out{first}"
            )
        return writer.finish(
            tokenizer=store_tokenizer(job.tokenizer),
            sources=job.described,
            settings=options.settings(),
            held_out_file=hold_out.file if hold_out else None,
        )


def _encode(writer: StoreWriter, job: Job, show: ShowProgress) -> None:
    """Appends all that the writer does not have yet, committing now and then."""
    options = job.options
    arguments = (job.tokenizer.model_bytes, options.read, options.hold_out)
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


def _tasks(job: Job, progress: _Progress) -> Iterator[EncodingTask]:
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
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(writer.counts.skipped.items()))
    allowed = "none is allowed by --strict"
    if not options.strict:
        allowed = f"--max-skipped-share allows {options.max_skipped_share:.2%} of {rows}"
    raise UserError(
        f"{skipped} rows cannot be used ({reasons}), {allowed}; {_first_skipped(writer.folder)}, all are in "
        f"{writer.folder / SKIPPED}. Mend them and run again with --overwrite, or allow more"
    )


def _first_skipped(folder: Path) -> str:
    with open(folder / SKIPPED, encoding="utf-8") as lines:
        first = json.loads(lines.readline())
    return f"the first is {first['file']} line {first['line']} ({first['reason']}: {first['detail']})"
