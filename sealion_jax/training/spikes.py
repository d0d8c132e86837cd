"""Losses that jump: how one is told, and what the run then does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

LEAST_LOSSES = 16
"""Before there are so many to compare with no loss is called a spike."""
LEAST_DEVIATION = 1e-3
"""Of the median: losses that hardly move at all make no spike of a loss that moves a little."""

_NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What is a spike of the loss, and what a run does at one, or at a loss that is not finite."""

    deviations: float | None = None
    """A loss so many standard deviations above the median of those before is a spike; None looks for none.

    Both are robust (the deviation is taken from the median absolute one), so that one spike does not hide
    the next. Batches differ: 6 to 10 are usual.
    """
    window_steps: int = 128
    """Losses that a loss is compared with: of the last updates that were made."""
    action: Literal["skip", "go_back"] = "skip"
    """Leave out this update alone, or go back and leave out all batches from there to this one."""
    back_steps: int = 100
    """With `go_back`: so many steps before the spike training takes up again, behind its batches."""
    most_times: int = 5
    """With `go_back`: a run that has gone back so often stops at the next spike."""

    def __post_init__(self) -> None:
        if self.deviations is not None:
            check_number("spikes.deviations", self.deviations, least=1)
        check_number("spikes.window_steps", self.window_steps, least=LEAST_LOSSES, whole=True)
        for name in ("back_steps", "most_times"):
            check_number(f"spikes.{name}", getattr(self, name), least=1, whole=True)


class SpikeFound(Exception):  # noqa: N818 (the run goes on)
    """The run goes back: the update of a step was not made, since its loss is a spike or not finite."""

    def __init__(self, step: int, loss: float | None, limit: float | None) -> None:
        """
        Args:
            step: counted from 1, as rows of metrics are.
            loss: None where it is not finite.
            limit: above which it is a spike; None where there is none yet.
        """
        super().__init__(step, loss, limit)
        self.step, self.loss, self.limit = step, loss, limit

    def __str__(self) -> str:
        if self.loss is None:
            return f"step {self.step}: loss or gradient not finite"
        return f"step {self.step}: loss {self.loss:.3f} is a spike (above {self.limit:.3f})"


def windowed(losses: Sequence[float], config: SpikeConfig) -> np.ndarray | None:
    """[W] the newest of these losses, of which the last is the newest; None where no spikes are looked for.

    Not a number where there are fewer than the window has room for.
    """
    if config.deviations is None:
        return None
    kept = np.asarray(losses[-config.window_steps :], np.float32)
    return np.concatenate([np.full(config.window_steps - len(kept), np.nan, np.float32), kept])


def spike_limit(losses: Float[Array, " W"], deviations: float) -> Float[Array, ""]:
    """The loss above which the next is a spike; infinite while there are fewer than `LEAST_LOSSES`.

    Args:
        losses: those before, oldest first; not a number where there were none.
    """
    median = jnp.nanmedian(losses)
    deviation = _NORMAL * jnp.nanmedian(jnp.abs(losses - median))
    limit = median + deviations * jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(median))
    return jnp.where(jnp.sum(~jnp.isnan(losses)) >= LEAST_LOSSES, limit, jnp.inf)


def with_loss(losses: Float[Array, " W"], loss: jax.Array) -> Float[Array, " W"]:
    """The window one loss further."""
    return jnp.concatenate([losses[1:], loss[None].astype(losses.dtype)])


def check_reachable(config: SpikeConfig, *, interval_steps: int, keep_last: int) -> None:
    """Raises UserError if checkpoints so far back as the run may go are not kept."""
    if config.action != "go_back" or interval_steps * (keep_last - 1) >= config.back_steps:
        return
    needed = -(-config.back_steps // interval_steps) + 1
    raise UserError(
        f"spikes.back_steps is {config.back_steps}, and the newest {keep_last} checkpoints, each "
        f"{interval_steps} steps apart, may not reach back so far; set checkpoints.keep_last to {needed} or "
        "more, or go back fewer steps"
    )
