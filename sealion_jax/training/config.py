"""How a run reports on itself."""

from __future__ import annotations

from dataclasses import dataclass

from sealion_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What goes to metrics.jsonl, TensorBoard and the terminal."""

    interval_steps: int = 1
    """Steps between rows of metrics; an evaluated step always has its row."""
    max_nonfinite_steps: int = 10
    """So many skipped updates in a row stop the run."""

    def __post_init__(self) -> None:
        if self.interval_steps < 1 or self.max_nonfinite_steps < 1:
            raise UserError("logging.interval_steps and logging.max_nonfinite_steps must be at least 1")
