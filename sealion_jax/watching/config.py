"""How long a run waits before it takes itself to be hung."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a process is taken to be dead, and a step or another piece of work to be hung."""

    beat_seconds: float = 3.0
    """Each process writes a heartbeat, and looks for its neighbour's, so often."""
    silent_seconds: float | None = 20.0
    """A process is asked for when its neighbour has seen no heartbeat for so long and waits; None never."""
    hang_factor: float = 10.0
    """A step is hung when it takes so many times the median of those before, and `least_seconds`."""
    least_seconds: float | None = 300.0
    """No step is hung before so long; None leaves steps alone."""
    phase_seconds: float | None = 3600.0
    """Limit of all else: building, restoring, compiling, one evaluation, one save; None sets none."""

    @property
    def last_resort_seconds(self) -> int:
        """When JAX itself should give a process up: after the watch had its time, of which it knows nothing.

        JAX ends the others without a word about where they were, and does not end the one that is stopped.
        """
        return max(60, math.ceil(3 * (self.silent_seconds or 0)))

    def __post_init__(self) -> None:
        check_number("watch.beat_seconds", self.beat_seconds, least=0.1)
        check_number("watch.hang_factor", self.hang_factor, above=1)
        for name in ("silent_seconds", "least_seconds", "phase_seconds"):
            value = getattr(self, name)
            if value is not None:
                check_number(f"watch.{name}", value, above=0)
        if self.silent_seconds is not None and self.silent_seconds < 2 * self.beat_seconds:
            raise UserError(
                f"watch.silent_seconds ({self.silent_seconds:g}) must be at least twice watch.beat_seconds "
                f"({self.beat_seconds:g}): a heartbeat that comes a moment late is none that is missing"
            )
