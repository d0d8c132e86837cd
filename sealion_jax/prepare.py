"""`python -m sealion_jax.prepare INPUT... --output STORE --tokenizer PATH`: text or chats into a token store.

Inputs are files, folders or patterns of JSONL, Parquet, plain text or ArrayRecord (local or gs://), or
tfds:name/config:version?split=...&data_dir=... . With --kind chats their rows are conversations, with --kind
pairs prompts with a chosen and a rejected answer. Stopped in any way, the same command goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sealion_jax import cli
from sealion_jax.errors import UserError

if TYPE_CHECKING:
    from sealion_jax.data.preparation.prepare import Prepared, PrepareOptions
    from sealion_jax.data.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to read, how, and where to put it."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")]
    """Files, folders, patterns in quotes, or tfds:name?split=...; documents keep their order."""
    output: str
    """The store's directory, local or gs://."""
    tokenizer: str
    """A SentencePiece .model file, or a Hugging Face directory with a tokenizer.model."""
    kind: Literal["text", "chats", "pairs"] = "text"
    """What a row holds: a text; a chat; or a prompt with a chosen and a rejected answer."""
    format: Literal["auto", "jsonl", "text", "parquet", "array_record"] = "auto"
    """Of the inputs; auto goes by each file's suffix."""
    text_field: str = "text"
    """The field or column with the document's text."""
    language_field: str = "lang"
    """The field with the document's language; rows without it count as und (undetermined)."""
    id_field: str = "id"
    """The field with the document's name."""
    language: str | None = None
    """One language for all documents, whatever their rows say."""
    text_unit: Literal["file", "line"] = "file"
    """What a document is in plain text."""
    record: Literal["json", "text"] = "json"
    """What an ArrayRecord record holds."""
    hold_out_share: float = 0.0
    """Share of the rows that are kept out of the store; a seeded hash of text, chat or prompt decides."""
    hold_out_seed: int = 0
    """Another seed holds out other rows."""
    hold_out_file: str | None = None
    """JSONL file that gets the rows held out."""
    max_skipped_share: float = 0.01
    """More rows than this share that cannot be used fail the command."""
    strict: bool = False
    """Fail at the first row that cannot be used."""
    workers: int | None = None
    """Processes; as many as there are cores by default. The result does not depend on it."""
    shard_tokens: int = 1 << 28
    """Tokens in each of the store's files (4 bytes each)."""
    overwrite: bool = False
    """Discard what the output holds."""
    work_dir: Path | None = None
    """Where a gs:// store is put together before it is copied up; it needs room for all of it."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("no input; name files, folders or patterns of text to prepare")
        if (self.hold_out_share > 0) != (self.hold_out_file is not None):
            raise UserError("--hold-out-share and --hold-out-file go together; give both or neither")
        if self.kind != "text" and self.text_field != "text":
            raise UserError(
                f"--text-field {self.text_field} is for text, and --kind {self.kind} reads other fields "
                "(docs/chat.md has them); leave out one of the two"
            )


def main(argv: Sequence[str]) -> None:
    """Parses, makes the store, and tells what is in it."""
    options = cli.parse(Options, argv, prog="python -m sealion_jax.prepare", description=__doc__)

    from sealion_jax.data.preparation.prepare import prepare
    from sealion_jax.tokenizer import Tokenizer

    prepared = prepare(
        options.inputs,
        options.output,
        tokenizer=Tokenizer.load(options.tokenizer),
        options=prepare_options(options),
        show=partial(cli.Progress, unit="B"),
        say=partial(print, file=sys.stderr, flush=True),
    )
    print(report(prepared, options))


def prepare_options(options: Options) -> PrepareOptions:
    """The command's options as `sealion_jax.data.preparation.prepare` takes them."""
    from sealion_jax.data.inputs.rows import FieldNames
    from sealion_jax.data.inputs.sources import ReadOptions
    from sealion_jax.data.preparation.encoding import HoldOut
    from sealion_jax.data.preparation.prepare import PrepareOptions

    names = FieldNames(
        text=options.text_field,
        language_field=options.language_field,
        id=options.id_field,
        language=options.language,
    )
    hold_out = None
    if options.hold_out_file is not None:
        hold_out = HoldOut(
            share=options.hold_out_share, seed=options.hold_out_seed, file=options.hold_out_file
        )
    return PrepareOptions(
        read=ReadOptions(
            kind=options.kind,
            format=None if options.format == "auto" else options.format,
            names=names,
            text_unit=options.text_unit,
            record=options.record,
        ),
        hold_out=hold_out,
        max_skipped_share=options.max_skipped_share,
        strict=options.strict,
        workers=options.workers,
        shard_tokens=options.shard_tokens,
        overwrite=options.overwrite,
        work_dir=options.work_dir,
    )


def report(prepared: Prepared, options: Options) -> str:
    """What the store holds, as lines of text, and what to do next."""
    manifest = prepared.manifest
    lines = [_table(manifest), ""]
    if prepared.nothing_to_do:
        lines.append(f"nothing to do: {options.output} was finished before, from the same inputs")
    else:
        lines.append(f"{options.output} is finished")
    if manifest.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
        lines.append(f"skipped rows: {reasons}; each is in {options.output.rstrip('/')}/skipped.jsonl")
    if options.hold_out_file is not None:
        lines.append(f"held out: {manifest.held_out:,} {_unit(manifest)} in {options.hold_out_file}")
    lines += [
        "",
        f'next: name it in a recipe, as SourceConfig(name="...", store="{options.output}"), and look at it:',
        "  python -m sealion_jax.preview RECIPE --step 0",
    ]
    return "\n".join(lines)


def _unit(manifest: Manifest) -> str:
    """What the rows in a store are called."""
    return "documents" if manifest.kind == "text" else manifest.kind


def _table(manifest: Manifest) -> str:
    from sealion_jax.data.store.manifest import LanguageTotals

    total = LanguageTotals(
        language="all", documents=manifest.documents, tokens=manifest.tokens, bytes=manifest.bytes
    )
    rows = [*manifest.languages, total] if len(manifest.languages) > 1 else list(manifest.languages)
    # Of conversations the bytes are the assistant's, the tokens everybody's: their quotient says nothing.
    is_text = manifest.kind == "text"
    size, last = ("bytes", f" {'bytes/token':>12}") if is_text else ("learned bytes", "")
    lines = [f"{'language':<10} {_unit(manifest):>14} {'tokens':>18} {size:>20}{last}"]
    for row in rows:
        number = row.documents // (2 if manifest.kind == "pairs" else 1)
        last = f" {row.bytes_per_token:>12.2f}" if is_text else ""
        lines.append(f"{row.language[:10]:<10} {number:>14,} {row.tokens:>18,} {row.bytes:>20,}{last}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
