"""How a run reports on itself."""

from __future__ import annotations

from dataclasses import dataclass

from sealion_jax.checks import check_number


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What goes to metrics.jsonl, TensorBoard and the terminal."""

    interval_steps: int = 1
    """Steps between rows of metrics; one that is evaluated, or skipped, always has its row."""
    max_nonfinite_steps: int = 10
    """So many skipped updates in a row stop the run."""

    def __post_init__(self) -> None:
        for name in ("interval_steps", "max_nonfinite_steps"):
            check_number(f"logging.{name}", getattr(self, name), least=1, whole=True)
