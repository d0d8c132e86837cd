"""What happens beside training, each as a hook of the loop: guard, evaluate, record, save, stop, profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from sealion_jax.distributed import StopRequest
from sealion_jax.errors import Preempted
from sealion_jax.metrics import MetricsLog, Row, plain
from sealion_jax.training.loop import Run


class NonFiniteError(RuntimeError):
    """So many updates in a row had a loss or gradient that is not finite that going on makes no sense."""


class Throughput:
    """Adds tokens per second, and where the device's peak is known MFU, to the row."""

    def __init__(self, *, flops_per_token: float, peak_flops_per_second: float | None) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if "tokens" not in row:
            return
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        if self._peak is not None:
            row["mfu"] = row["tokens_per_second"] * self._flops_per_token / self._peak


class GuardNonFinite:
    """Counts skipped updates; stops the run, naming the batch, when too many come in a row."""

    def __init__(self, limit: int, describe_batch: Callable[[int], str]) -> None:
        self._limit = limit
        self._describe_batch = describe_batch

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if "nonfinite" not in row:
            return
        counters = run.counters
        counters["tokens"] += row["tokens"]
        counters["nonfinite"] += row["nonfinite"]
        counters["nonfinite_in_a_row"] = counters["nonfinite_in_a_row"] + 1 if row["nonfinite"] else 0
        row["nonfinite_total"] = counters["nonfinite"]
        if counters["nonfinite_in_a_row"] >= self._limit:
            raise NonFiniteError(
                f"step {row['step']}: loss or gradient not finite {self._limit} times in a row; the weights "
                f"are as they were after step {row['step'] - self._limit}. Lower the learning rate, or look "
                f"at this batch's documents:\n{self._describe_batch(row['step'] - 1)}"
            )


class Evaluate:
    """Adds `eval/<set>/<metric>` to the row: before the first step, now and then, and after the last."""

    def __init__(self, evaluate: Callable[[Any], Row], *, interval_steps: int, last_step: int) -> None:
        self._evaluate = evaluate
        self._interval = interval_steps
        self._last_step = last_step

    def needs_state(self, step: int) -> bool:
        return step in (0, self._last_step) or (self._interval > 0 and step % self._interval == 0)

    def __call__(self, run: Run, row: Row) -> None:
        if self.needs_state(row["step"]):
            row.update(self._evaluate(run.state.params))


class Record:
    """Writes rows to metrics.jsonl and TensorBoard, and shows progress."""

    def __init__(
        self, log: MetricsLog | None, show: Callable[[Row], None], *, interval_steps: int, last_step: int
    ) -> None:
        self._log = log
        self._show = show
        self._interval = interval_steps
        self._last_step = last_step

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        row["time"] = time.time()
        evaluated = any(name.startswith("eval/") for name in row)
        if self._log and (evaluated or row["step"] % self._interval == 0 or row["step"] == self._last_step):
            self._log.append(plain(row))
        self._show(row)


class Plot:
    """Redraws the plots after every evaluation and at the end."""

    def __init__(self, draw: Callable[[], None], *, last_step: int) -> None:
        self._draw = draw
        self._last_step = last_step

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if row["step"] == self._last_step or any(name.startswith("eval/") for name in row):
            self._draw()


class Save:
    """Saves every so many steps, after the last, and when the run is asked to stop.

    An error of the save before, which goes on in the background, is raised at the next step.
    """

    def __init__(
        self,
        save: Callable[[Run], None],
        check: Callable[[], None],
        stop: StopRequest,
        *,
        interval_steps: int,
        last_step: int,
    ) -> None:
        self._save = save
        self._check = check
        self._stop = stop
        self._interval = interval_steps
        self._last_step = last_step

    def needs_state(self, step: int) -> bool:
        stopping = self._stop.requested(step)
        return step > 0 and (stopping or step == self._last_step or step % self._interval == 0)

    def __call__(self, run: Run, row: Row) -> None:
        self._check()
        if self.needs_state(row["step"]):
            self._save(run)


class Stop:
    """Ends a run that was asked to stop, once its state is safe."""

    def __init__(self, stop: StopRequest, wait_for_save: Callable[[], None]) -> None:
        self._stop = stop
        self._wait_for_save = wait_for_save

    def needs_state(self, step: int) -> bool:
        return self._stop.requested(step)

    def __call__(self, run: Run, row: Row) -> None:
        if self._stop.requested(row["step"]) and row["step"] < run.steps:
            self._wait_for_save()
            raise Preempted(f"asked to stop; saved step {row['step']} of {run.steps}; run me again to go on")


class Profile:
    """Traces a few steps, after compilation, into a folder that TensorBoard and XProf open."""

    def __init__(self, folder: epath.Path, *, first_step: int, num_steps: int = 3) -> None:
        self._folder = folder
        self._first = first_step
        self._last = first_step + num_steps

    def needs_state(self, step: int) -> bool:
        return step in (self._first, self._last)

    def __call__(self, run: Run, row: Row) -> None:
        if row["step"] == self._first:
            jax.profiler.start_trace(str(self._folder))
        elif row["step"] == self._last:
            jax.block_until_ready(run.state)
            jax.profiler.stop_trace()
