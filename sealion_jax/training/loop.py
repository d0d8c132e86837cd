"""The training loop: next batch, step, hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from sealion_jax.metrics import Row
from sealion_jax.training.state import TrainState

COUNTERS = ("tokens", "nonfinite", "spikes", "went_back")
"""Tokens trained on, updates skipped as not finite or as spikes, and how often the run went back."""

Update = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]


@dataclass
class Run:
    """What hooks see of a run, and may change: the only mutable thing in the loop."""

    state: TrainState
    steps: int
    """Steps of the whole run."""
    step: int = 0
    """Updates whose numbers have been read; `state` is that far when a hook that needs it is called."""
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    """Saved with each checkpoint."""
    skipped_in_a_row: int = 0
    """Updates skipped up to now, one after another; not saved, so a run that goes on begins with none."""


class Hook(Protocol):
    """Something that happens beside training: recording, evaluation, saving, stopping."""

    def needs_state(self, step: int) -> bool:
        """Whether the hook must see the state after exactly `step` updates; the next then waits."""
        ...

    def __call__(self, run: Run, row: Row) -> None:
        """Called once a step with its row of numbers, which it may add to; hooks are called in order."""
        ...


def train(
    run: Run,
    update: Update,
    *,
    batches: Iterator[tuple[int, Mapping[str, np.ndarray]]],
    to_device: Callable[[Mapping[str, np.ndarray]], Any],
    summarise: Callable[[dict[str, Any]], Row],
    hooks: Sequence[Hook],
) -> Run:
    """The run after its last step.

    Numbers are read one step late, while the next step computes, so that dispatch never waits; only a hook
    that needs the state makes it wait.

    Args:
        batches: (number of the step from 0, this process's rows), from `run.step` on.
        summarise: from a step's metrics on the device to plain numbers.
    """
    pending: tuple[int, dict[str, Any], float] | None = None
    finished_at = time.perf_counter()

    def finish(step: int, metrics: dict[str, Any], waited: float) -> None:
        nonlocal finished_at
        row = summarise(jax.device_get(metrics))
        now = time.perf_counter()
        run.step = step
        row = {"step": step, **row, "seconds": now - finished_at, "data_wait_seconds": waited}
        for hook in hooks:
            hook(run, row)
        # What hooks took (an evaluation, a save) is not the next step's time.
        finished_at = time.perf_counter() if any(hook.needs_state(step) for hook in hooks) else now

    while run.step + (pending is not None) < run.steps:
        asked = time.perf_counter()
        number, rows = next(batches)
        waited = time.perf_counter() - asked
        run.state, metrics = update(run.state, np.int32(number), to_device(rows))
        if pending is not None:
            finish(*pending)
        pending = (number + 1, metrics, waited)
        # Every hook is asked: processes must ask for the same things in the same order.
        if any([hook.needs_state(number + 1) for hook in hooks]):
            finish(*pending)
            pending = None
    if pending is not None:
        finish(*pending)
    return run
