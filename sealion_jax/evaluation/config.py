"""What is evaluated, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sealion_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out text measured during training, and by `evaluate` in the same way."""

    sets: Mapping[str, str] = field(default_factory=dict)
    """Name of a set -> JSONL file (also .gz or .zst) of `{"text", "lang"}` rows, local or gs://."""
    interval_steps: int = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    batch_size: int = 8
    """Rows of `sequence_length_tokens` in a forward pass, rounded up to the devices."""
    max_documents: int | None = None
    """Of each set, only this many documents from its start."""

    def __post_init__(self) -> None:
        if self.interval_steps < 0:
            raise UserError(f"evaluation.interval_steps must not be negative, not {self.interval_steps}")
        if self.batch_size < 1:
            raise UserError(f"evaluation.batch_size must be positive, not {self.batch_size}")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"evaluation.max_documents must be positive, not {self.max_documents}")
