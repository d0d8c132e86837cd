"""What a mixture will give over a run: tokens and epochs of every source and language."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sealion_jax.data.mixture import Mixture
from sealion_jax.data.packing.examples import LeftOut, PackedExamples

MOST_LISTED = 10_000
"""Of each source, so many examples that are left out are listed."""
EPOCHS_BEFORE_WARNING = 4.0
"""Up to about four epochs repeated text is worth nearly as much as new text, and less and less after that:
Muennighoff et al., "Scaling Data-Constrained Language Models" (2023, arXiv:2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One source, one language of one source, or one language over all sources; tokens are stored tokens."""

    source: str | None
    """None: over all sources."""
    language: str | None
    """None: all its languages."""
    tokens: int
    """In the stores, once."""
    share: float
    """Of the planned tokens of all sources."""
    planned_tokens: float
    epochs: float
    repeats_from_step: int | None = None
    """Where its second epoch begins, to within a few rows; None if not in this run."""
    epoch_limit: float | None = None
    """Of a source: how many epochs of it are worth their computing."""

    @property
    def repeats_too_often(self) -> bool:
        return self.epoch_limit is not None and self.epochs > self.epoch_limit


def plan_table(
    mixture: Mixture, *, steps: int, epochs_before_warning: float = EPOCHS_BEFORE_WARNING
) -> tuple[PlanRow, ...]:
    """Rows for each source, each language in it, each language over all sources, and everything.

    Within a source, languages are drawn as they lie in its store: their epochs are the source's.
    """
    counts = mixture.schedule.counts(steps * mixture.global_batch_size)
    epochs = [int(count) / len(windows) for count, windows in zip(counts, mixture.sources, strict=True)]
    planned = [e * w.store.num_tokens for e, w in zip(epochs, mixture.sources, strict=True)]
    total = max(sum(planned), 1.0)
    rows, languages = [], dict[str, tuple[int, float]]()
    for source, windows in enumerate(mixture.sources):
        repeats = mixture.repeats_from_step(source)
        repeats = repeats if repeats is not None and repeats < steps else None
        rows.append(
            PlanRow(
                source=mixture.names[source],
                language=None,
                tokens=windows.store.num_tokens,
                share=planned[source] / total,
                planned_tokens=planned[source],
                epochs=epochs[source],
                repeats_from_step=repeats,
                epoch_limit=epochs_before_warning,
            )
        )
        for language in windows.store.manifest.languages:
            mine = epochs[source] * language.tokens
            have, plan = languages.get(language.language, (0, 0.0))
            languages[language.language] = (have + language.tokens, plan + mine)
            rows.append(
                PlanRow(
                    source=mixture.names[source],
                    language=language.language,
                    tokens=language.tokens,
                    share=mine / total,
                    planned_tokens=mine,
                    epochs=epochs[source],
                )
            )
    for name, (have, plan) in languages.items():
        rows.append(_over_all_sources(name, have, plan, total))
    have = sum(windows.store.num_tokens for windows in mixture.sources)
    return (*rows, _over_all_sources(None, have, sum(planned), total))


def _over_all_sources(language: str | None, tokens: int, planned: float, total: float) -> PlanRow:
    return PlanRow(
        source=None,
        language=language,
        tokens=tokens,
        share=planned / total,
        planned_tokens=planned,
        epochs=planned / tokens if tokens else 0.0,
    )


def format_plan(rows: Sequence[PlanRow]) -> str:
    """The rows as an aligned table, warnings below it."""
    header = ("source", "language", "tokens", "planned", "share", "epochs", "repeats from step")
    cells = [header, *(_cells(row, rows) for row in rows if not _is_told_elsewhere(row, rows))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_warnings(rows)])


def _warnings(rows: Sequence[PlanRow]) -> list[str]:
    sources = [row for row in rows if row.source is not None and row.language is None]
    unused = ", ".join(str(row.source) for row in sources if row.epochs == 0)
    often = ", ".join(f"{row.source} ({row.epochs:.1f} times)" for row in sources if row.repeats_too_often)
    warnings = []
    if unused:
        warnings.append(f"warning: nothing is read of {unused}: a weight of 0, or too small for so few rows")
    if often:
        warnings.append(
            f"warning: read more than {sources[0].epoch_limit:g} times: {often}. Repeated text is nearly as "
            "good as new for about four epochs, then less and less (arXiv:2305.16264): give it a smaller "
            "share, or more text"
        )
    return warnings


def _is_told_elsewhere(row: PlanRow, rows: Sequence[PlanRow]) -> bool:
    """A source's only language stands in the source's own line; a language of one source only, there."""
    if row.language is None:
        return False
    if row.source is None:
        return sum(o.language == row.language for o in rows if o.source is not None) == 1
    return len(_languages_of(row.source, rows)) == 1


def _languages_of(source: str | None, rows: Sequence[PlanRow]) -> list[str]:
    return [row.language for row in rows if row.source == source and row.language is not None]


def _cells(row: PlanRow, rows: Sequence[PlanRow]) -> tuple[str, ...]:
    languages = _languages_of(row.source, rows)
    language = row.language or (languages[0] if len(languages) == 1 else "")
    return (
        row.source or ("all" if row.language is None else "all of"),
        language,
        amount(row.tokens),
        amount(row.planned_tokens),
        f"{row.share:.2%}",
        f"{row.epochs:.2f}",
        "" if row.repeats_from_step is None else f"{row.repeats_from_step:,}",
    )


@dataclass(frozen=True, kw_only=True)
class ExamplesRow:
    """What of one source of chats or pairs is in rows."""

    source: str
    unit: str
    examples: int
    """In rows, the cut ones too."""
    stored: int
    rows: int
    full: float
    """Share of the rows' positions that is no padding."""
    left_out: LeftOut


def examples_table(mixture: Mixture) -> tuple[ExamplesRow, ...]:
    """A row for each source of chats or pairs."""
    return tuple(
        ExamplesRow(
            source=name,
            unit=packed.unit,
            examples=packed.num_examples,
            stored=packed.store.num_documents // packed.group,
            rows=len(packed),
            full=packed.num_positions / (len(packed) * packed.sequence_length_tokens),
            left_out=packed.left_out(),
        )
        for name, packed in zip(mixture.names, mixture.sources, strict=True)
        if isinstance(packed, PackedExamples)
    )


def format_examples(rows: Sequence[ExamplesRow]) -> str:
    """A line for each source, and one below it for each way in which examples were left out or cut."""
    lines = []
    for row in rows:
        lines.append(
            f"{row.source}: {row.examples:,} of {row.stored:,} {row.unit} in {row.rows:,} rows, "
            f"{row.full:.1%} full"
        )
        told = (
            ("longer than a row, left out", row.left_out.too_long),
            ("nothing to learn left after the cut, left out", row.left_out.nothing_to_learn),
            ("longer than a row, cut from the left", row.left_out.truncated),
        )
        for what, counts in told:
            if counts:
                languages = ", ".join(f"{language} {count:,}" for language, count in counts.items())
                lines.append(f"  {what}: {sum(counts.values()):,} ({languages})")
    return "\n".join(lines)


def left_out_rows(mixture: Mixture, *, most: int = MOST_LISTED) -> Iterator[dict[str, Any]]:
    """Where each chat or pair stood that is in no row, and why it is not: of each source the first `most`."""
    for name, packed in zip(mixture.names, mixture.sources, strict=True):
        if not isinstance(packed, PackedExamples):
            continue
        store = packed.store
        for reason, document in itertools.islice(packed.left_out_documents(), most):
            file, row = store.origin(document)
            language = store.language_names[int(store.languages[document])]
            yield {"source": name, "reason": reason, "language": language, "file": file, "row": row}


def amount(tokens: float) -> str:
    """A number of tokens for people, with three digits: 950, 12.3k, 4.50M, 1.20B, 15.0T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            short = tokens / size
            return f"{short:.{2 if short < 10 else 1 if short < 100 else 0}f}{unit}"
    return f"{tokens:.0f}"
