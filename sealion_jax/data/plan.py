"""What a mixture will give over a run: tokens and epochs of every source and language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sealion_jax.data.mixture import Mixture

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
    warning: str | None = None


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
        warning = _warning(mixture.names[source], epochs[source], repeats, epochs_before_warning)
        rows.append(
            PlanRow(
                source=mixture.names[source],
                language=None,
                tokens=windows.store.num_tokens,
                share=planned[source] / total,
                planned_tokens=planned[source],
                epochs=epochs[source],
                repeats_from_step=repeats,
                warning=warning,
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


def _warning(name: str, epochs: float, repeats: int | None, limit: float) -> str | None:
    if epochs == 0:
        return f"{name} gives nothing in this run: its weight is 0, or too small for so few rows"
    if epochs > limit:
        return (
            f"{name} is read {epochs:.1f} times (it starts over at about step {repeats}); beyond about "
            f"{limit:g} epochs text that is read again teaches little (arXiv:2305.16264): give it a smaller "
            "share, or more text"
        )
    return None


def format_plan(rows: Sequence[PlanRow]) -> str:
    """The rows as an aligned table, warnings below it."""
    header = ("source", "language", "tokens", "planned", "share", "epochs", "repeats from step")
    cells = [header, *(_cells(row, rows) for row in rows if not _is_redundant(row, rows))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = []
    for line in cells:
        texts = [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(texts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(f"warning: {row.warning}" for row in rows if row.warning)])


def _is_redundant(row: PlanRow, rows: Sequence[PlanRow]) -> bool:
    """A source's only language is shown on the source's own line, and all sources' only one on the last."""
    return row.language is not None and sum(_same_group(row, other) for other in rows) == 1


def _same_group(row: PlanRow, other: PlanRow) -> bool:
    return other.source == row.source and other.language is not None


def _cells(row: PlanRow, rows: Sequence[PlanRow]) -> tuple[str, ...]:
    only = [other.language for other in rows if _same_group(row, other)]
    language = row.language or (str(only[0]) if len(only) == 1 else "")
    return (
        row.source or ("all" if row.language is None else "all of"),
        language,
        amount(row.tokens),
        amount(row.planned_tokens),
        f"{row.share:.2%}",
        f"{row.epochs:.2f}",
        "" if row.repeats_from_step is None else f"{row.repeats_from_step:,}",
    )


def amount(tokens: float) -> str:
    """A number of tokens for people: 950, 12.3k, 4.56M, 1.2B, 15T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}" if tokens < 999.5 * size else f"{tokens / size:,.0f}{unit}"
    return f"{tokens:.0f}"
