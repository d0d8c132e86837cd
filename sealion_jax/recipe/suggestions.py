"""Which field an unknown name on the command line was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "steps": ("epochs", "num-epochs", "num-train-epochs", "max-steps", "train-steps", "iterations"),
    "model.model-dim": ("hidden-size", "d-model"),
    "global-batch-size": ("batch-size", "bs", "train-batch-size", "per-device-train-batch-size"),
    "microbatches": ("micro-batch-size", "gradient-accumulation-steps", "grad-accum", "accumulation-steps"),
    "sequence-length-tokens": ("context-length", "max-length", "max-seq-length", "block-size"),
    "init-from": ("checkpoint", "pretrained", "model-name-or-path", "load", "resume"),
    "run-dir": ("output-dir", "output", "save-dir", "ckpt-dir", "log-dir"),
    "compute.dtype": ("precision", "mixed-precision", "torch-dtype", "bf16", "fp16", "fp32", "tf32", "half"),
    "compute.remat": ("gradient-checkpointing", "activation-checkpointing", "recompute"),
    "compute.attention": ("flash-attention", "flash-attn", "attn-implementation"),
    "optimizer.schedule.peak-learning-rate": ("lr", "max-lr", "base-lr"),
    "optimizer.max-grad-norm": ("clip", "grad-clip", "clip-grad", "clip-norm", "gradient-clipping"),
    "optimizer.schedule.final-learning-rate": ("min-lr", "min-learning-rate", "lr-end"),
    "checkpoints.interval-steps": ("save-steps", "save-interval", "save-every", "checkpoint-interval"),
    "checkpoints.keep-last": ("save-total-limit", "max-to-keep"),
    "evaluation.interval-steps": ("eval-steps", "eval-interval", "eval-every"),
    "logging.interval-steps": ("logging-steps", "log-interval", "log-every"),
    "mesh.tensor": ("tp", "tensor-parallel", "tensor-parallel-size", "model-parallel"),
    "mesh.data": ("dp", "data-parallel", "data-parallel-size"),
}
"""What other trainers call a field whose own words do not tell."""

_MISSPELT = 0.85
_ALIKE = 0.75
_MOST = 3


def suggest(name: str, known: Sequence[str]) -> list[str]:
    """The one to three of the `known` names that `name` may have been meant to be, best first.

    Names have no leading dashes. First come whole names that are only misspelt, then what other trainers call
    a field, then names whose last part has the same words, or words that they abbreviate: `seq-len` for
    sequence-length-tokens, `lr` for learning-rate.
    """
    name = name.replace("_", "-").lower()
    last = name.rsplit(".", 1)[-1]
    called = [field for field, others in OTHER_NAMES.items() if last in others and field in known]
    spelt = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in known}
    meant = {other: _likeness(name, other) for other in known}
    return (
        _best(spelt, least=_MISSPELT, within=0.95)
        or called
        or _best(meant, least=0.01, within=0.85)
        or difflib.get_close_matches(name, known, n=1, cutoff=0)
    )


def _best(scores: Mapping[str, float], *, least: float, within: float) -> list[str]:
    """The names that score at least `least`, and `within` of the best, in the order of their scores."""
    top = max(scores.values(), default=0)
    fitting = [name for name, score in scores.items() if score >= max(least, within * top)]
    return sorted(fitting, key=lambda name: -scores[name])[:_MOST]


def _likeness(name: str, other: str) -> float:
    """How much of `name`'s last part is in `other`, or half as much in its groups."""
    *groups, last = name.split(".")
    *other_groups, other_last = other.split(".")
    words = _words(last)
    share = _shared_words(words, _words(other_last))
    share = max([share, *(0.5 * _shared_words(words, _words(group)) for group in other_groups)])
    if share == 0:
        return 0
    common = sum(group in other_groups for group in groups) / max(len(groups), 1)
    return share + 0.2 * common


def _shared_words(words: Sequence[str], others: Sequence[str]) -> float:
    """3/4 of the share of `words` found in `others`, 1/4 of the share of `others` that were found so."""
    found: set[int] = set()
    total = 0.0
    for word in words:
        credit, count, place = max((*_credit(word, others[place:]), place) for place in range(len(others)))
        total += credit
        found.update(range(place, place + count))
    return 0.75 * total / len(words) + 0.25 * len(found) / len(others)


def _credit(word: str, others: Sequence[str]) -> tuple[float, int]:
    """How well `word` stands for the first of `others`, from 0 to 1, and for how many of them."""
    other = others[0]
    if word == other:
        return 1, 1
    if min(len(word), len(other)) >= 2 and (other.startswith(word) or word.startswith(other)):
        return 0.9, 1
    initials = "".join(following[0] for following in others[: len(word)])
    if len(word) >= 2 and initials == word:
        return 0.9, len(word)
    ratio = difflib.SequenceMatcher(None, word, other).ratio()
    return (0.9 * ratio, 1) if ratio >= _ALIKE else (0, 0)


def _words(part: str) -> list[str]:
    return [word for word in re.split(r"[-_]+", part) if word] or [part]
