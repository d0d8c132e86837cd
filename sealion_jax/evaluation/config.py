"""What is evaluated, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sealion_jax.checks import check_number


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out texts, chats and pairs measured during training, and by `evaluate` in the same way."""

    sets: Mapping[str, str] = field(default_factory=dict)
    """Name of a set -> JSONL file (also .gz or .zst), local or gs://. Its first row tells its kind: text
    (`text`), chats (`messages`, or `prompt` and `completion`) or pairs (`prompt`, `chosen`, `rejected`); any
    may have `lang` and `id`."""
    interval_steps: int = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    batch_size: int = 8
    """Rows of `sequence_length_tokens` in a forward pass, rounded up to the devices."""
    max_documents: int | None = None
    """Of each set, only this many texts, chats or pairs from its start."""

    def __post_init__(self) -> None:
        check_number("evaluation.interval_steps", self.interval_steps, least=0, whole=True)
        check_number("evaluation.batch_size", self.batch_size, least=1, whole=True)
        if self.max_documents is not None:
            check_number("evaluation.max_documents", self.max_documents, least=1, whole=True)
