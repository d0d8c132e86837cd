"""What `evaluate` writes and shows: metrics of sets, a line for each document or pair, and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.evaluation.pairs import PairReference, PairScores
from sealion_jax.evaluation.perplexity import EvaluationSet, Score, pair_scores, set_metrics

Fields = dict[str, Any]


def report(
    sets: Sequence[EvaluationSet],
    scores: Mapping[str, Sequence[Score]],
    reference_scores: Mapping[str, Sequence[Score]],
) -> Fields:
    """`sets`, the kind and metrics of each, in all and by language; `documents` and `pairs`, a line for each.

    Args:
        scores: of each set's documents, by its name.
        reference_scores: the reference's, of sets of pairs.
    """
    references = {name: pair_scores(values) for name, values in reference_scores.items()}
    result: Fields = {"sets": {}, "documents": [], "pairs": []}
    for one in sets:
        reference = references.get(one.name)
        whole, parts = set_metrics(one, scores[one.name], reference)
        result["sets"][one.name] = {"kind": one.kind, **whole, "by_language": parts}
        if one.kind == "pairs":
            result["pairs"] += _pair_lines(one, pair_scores(scores[one.name]), reference)
        else:
            result["documents"] += _document_lines(one, scores[one.name])
    return result


def _document_lines(one: EvaluationSet, scores: Sequence[Score]) -> list[Fields]:
    """The name, log-probability and sizes of each text or chat."""
    return [
        {
            "set": one.name,
            "id": document.id,
            "lang": document.language,
            "log_prob": -score.nats,
            # A chat has no <eos>.
            **({"eos_log_prob": -score.eos_nats} if one.kind == "text" else {}),
            "tokens": score.tokens,
            "bytes": score.num_bytes,
        }
        for document, score in zip(one.documents, scores, strict=True)
    ]


def _pair_lines(one: EvaluationSet, pairs: PairScores, reference: PairReference | None) -> list[Fields]:
    """The name of each pair, and the log-probabilities and tokens of its answers."""
    columns = {
        "chosen_log_prob": pairs.chosen,
        "rejected_log_prob": pairs.rejected,
        "chosen_tokens": pairs.chosen_tokens,
        "rejected_tokens": pairs.rejected_tokens,
    }
    if reference is not None:
        columns |= {
            "reference_chosen_log_prob": reference.chosen,
            "reference_rejected_log_prob": reference.rejected,
        }
    return [
        {"set": one.name, "id": example.id, "lang": example.language}
        | {name: values[n].item() for name, values in columns.items()}
        for n, example in enumerate(one.examples)
    ]


class _Column(NamedTuple):
    title: str
    width: int
    cell: Callable[[Mapping[str, Any]], str]


_BITS = _Column("bits/byte", 9, lambda row: f"{row['bits_per_byte']:.4f}")
_PERPLEXITY = _Column("perplexity", 11, lambda row: f"{row['perplexity']:.2f}")
_LOSS = _Column("loss", 7, lambda row: f"{row['loss']:.4f}")
_TOKENS = _Column("tokens", 10, lambda row: f"{row['tokens']:,}")
_COLUMNS: dict[StoreKind, tuple[_Column, ...]] = {
    "text": (
        _BITS,
        _PERPLEXITY,
        _LOSS,
        _TOKENS,
        _Column("documents", 9, lambda row: f"{row['documents']:,}"),
    ),
    "chats": (_LOSS, _PERPLEXITY, _BITS, _TOKENS, _Column("chats", 9, lambda row: f"{row['documents']:,}")),
    "pairs": (
        _Column("accuracy", 9, lambda row: f"{row['accuracy']:.3f}"),
        _Column("per token", 9, lambda row: f"{row['accuracy_per_token']:.3f}"),
        _LOSS,
        _Column("pairs", 9, lambda row: f"{row['pairs']:,}"),
    ),
}
_REWARDS = (
    _Column("reward accuracy", 20, lambda row: f"{row['reward_accuracy']:.3f} {_interval(row)}"),
    _Column("margin", 8, lambda row: f"{row['reward_margin']:.3f}"),
)


def _interval(row: Mapping[str, Any]) -> str:
    return f"[{row['reward_accuracy_low']:.3f}, {row['reward_accuracy_high']:.3f}]"


def tables(sets: Mapping[str, Fields]) -> str:
    """A table for each kind, with a line for each set and each language in it, from `sets` of a report."""
    parts = []
    for kind, columns in _COLUMNS.items():
        chosen = {name: numbers for name, numbers in sets.items() if numbers["kind"] == kind}
        if chosen:
            # With a reference, all sets of pairs have rewards.
            has_rewards = all("reward_accuracy" in numbers for numbers in chosen.values())
            parts.append(_table(chosen, (*columns, *_REWARDS) if has_rewards else columns))
    return "\n\n".join(parts)


def _table(sets: Mapping[str, Fields], columns: Sequence[_Column]) -> str:
    titles = [f"{column.title:>{column.width}}" for column in columns]
    lines = [" ".join([f"{'set':<28} {'lang':<8}", *titles])]
    for name, numbers in sets.items():
        groups = [("all", numbers)] if len(numbers["by_language"]) != 1 else []
        for language, row in [*groups, *numbers["by_language"].items()]:
            cells = [f"{column.cell(row):>{column.width}}" for column in columns]
            lines.append(" ".join([f"{name[:28]:<28} {language[:8]:<8}", *cells]))
    return "\n".join(lines)
