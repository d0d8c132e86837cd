"""What happens beside training, each as a hook of the loop: count, evaluate, record, guard, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from sealion_jax.errors import Preempted
from sealion_jax.goodput import Ledger, account, goodput
from sealion_jax.metrics import MetricsLog, Row, plain
from sealion_jax.stopping import StopRequest
from sealion_jax.training.loop import Run
from sealion_jax.training.spikes import SpikeFound


class NonFiniteError(RuntimeError):
    """So many updates in a row had a loss or gradient that is not finite that going on makes no sense."""


def _is_skipped(row: Row) -> bool:
    """Whether the update of the row's step was not made."""
    return bool(row.get("nonfinite") or row.get("spike"))


class NoteStep:
    """Tells whoever watches over the run that a step is done."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self._note = note

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if row["step"] > 0:
            self._note(row["step"])


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


class Goodput:
    """Keeps the account of the run's time, and adds the share that went into steps that count to the row."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if row["step"] > 0:
            self._ledger.finished_step(row["step"])
            row["goodput"] = goodput(account(self._ledger.sessions))


class CountSkipped:
    """Counts tokens and skipped updates, in all and in a row: what other hooks go by."""

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if "nonfinite" not in row:
            return
        run.counters["tokens"] += row["tokens"]
        run.counters["nonfinite"] += row["nonfinite"]
        run.counters["spikes"] += row.get("spike", 0)
        run.skipped_in_a_row = run.skipped_in_a_row + 1 if _is_skipped(row) else 0
        row["nonfinite_total"] = run.counters["nonfinite"]
        if "spike" in row:
            row["spikes_total"] = run.counters["spikes"]


class GuardSpikes:
    """Has the run go back at the first update that was skipped, so often and no more.

    Comes after the row was recorded, and before a save could follow.
    """

    def __init__(self, most_times: int) -> None:
        self._most_times = most_times

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        if not run.skipped_in_a_row:
            return
        spiked = bool(row.get("spike"))
        found = SpikeFound(
            row["step"], row["loss"] if spiked else None, row["spike_limit"] if spiked else None
        )
        if run.counters["went_back"] < self._most_times:
            raise found
        raise NonFiniteError(
            f"{found}, and the run has gone back {self._most_times} times already, which is as often as "
            "spikes.most_times allows. Lower optimizer.schedule.peak_learning_rate or raise "
            "spikes.deviations, and run the command again, which goes on from the newest checkpoint"
        )


class GuardNonFinite:
    """Stops the run, and shows the first batch, when too many updates were skipped in a row.

    Comes after the row was recorded, and before a save could follow.
    """

    def __init__(self, limit: int, show_batch: Callable[[int], str]) -> None:
        """
        Args:
            show_batch: what to say of the batch of a step, which is counted from 0 as data is.
        """
        self._limit = limit
        self._show_batch = show_batch
        self._spikes = 0

    def needs_state(self, step: int) -> bool:
        return False

    def __call__(self, run: Run, row: Row) -> None:
        self._spikes = self._spikes + bool(row.get("spike")) if run.skipped_in_a_row else 0
        if run.skipped_in_a_row < self._limit:
            return
        last, good = row["step"], row["step"] - run.skipped_in_a_row
        what, advice = "loss or gradient not finite", "Lower optimizer.schedule.peak_learning_rate"
        if self._spikes:
            what += f", or a spike ({self._spikes} of them; the limit is {row['spike_limit']:.3f}),"
            advice = (
                "Where data changed, as in a new stage of the mixture, higher losses are no spikes: raise "
                f"spikes.deviations, or set it to none. Else {advice.lower()}"
            )
        raise NonFiniteError(
            f"{what} {run.skipped_in_a_row} times in a row, from step {good + 1} to "
            f"{last}; the weights are as they were after step {good}, and none of these steps was saved. "
            f"{advice}, and run the command again, which goes on from the newest checkpoint if there is one; "
            f"or look at the first of these batches:\n{self._show_batch(good)}"
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
            row.update(self._evaluate(run.state.weights))


class Record:
    """Writes rows to metrics.jsonl and TensorBoard, and shows progress.

    Besides those of every so many steps those that were evaluated, or whose update was skipped.
    """

    def __init__(
        self, log: MetricsLog, show: Callable[[Row], None], *, interval_steps: int, last_step: int
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
        due = row["step"] % self._interval == 0 or row["step"] == self._last_step
        if due or evaluated or _is_skipped(row):
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

    While updates are skipped none of the saves of every so many steps is made, since nothing is new in them
    and they would push good ones out: it is made up for after the next update that is not skipped. An error
    of the save before, which goes on in the background, is raised at the next step.
    """

    def __init__(
        self,
        save: Callable[[Run], None],
        check: Callable[[], None],
        *,
        sync: Callable[[], None],
        stop: StopRequest,
        interval_steps: int,
        last_step: int,
    ) -> None:
        """
        Args:
            sync: has the rows of all steps up to here on disk; they are not written again after a resume.
        """
        self._save = save
        self._check = check
        self._sync = sync
        self._stop = stop
        self._interval = interval_steps
        self._last_step = last_step
        self._owed = False

    def needs_state(self, step: int) -> bool:
        # Before all else: every process asks for every step.
        is_end = self._is_end(step)
        return step > 0 and (is_end or self._owed or step % self._interval == 0)

    def __call__(self, run: Run, row: Row) -> None:
        self._check()
        if not self.needs_state(row["step"]):
            return
        self._owed = run.skipped_in_a_row > 0 and not self._is_end(row["step"])
        if not self._owed:
            self._sync()
            self._save(run)

    def _is_end(self, step: int) -> bool:
        return self._stop.requested(step) or step == self._last_step


class Stop:
    """Ends a run that was asked to stop, once its state is safe."""

    def __init__(self, stop: StopRequest, wait_for_save: Callable[[], None]) -> None:
        self._stop = stop
        self._wait_for_save = wait_for_save

    def needs_state(self, step: int) -> bool:
        return self._stop.requested(step)

    def __call__(self, run: Run, row: Row) -> None:
        step = row["step"]
        if not self._stop.requested(step) or step == run.steps:
            return
        if step == 0:
            raise Preempted("asked to stop before the first step, so there is nothing to save; run me again")
        self._wait_for_save()
        raise Preempted(f"asked to stop; saved step {step} of {run.steps}; run me again to go on")


class Profile:
    """Traces a few steps, after compilation, into a folder that TensorBoard and XProf open.

    A context, so that a trace is written when the run ends in the midst of it, for whatever reason.
    """

    def __init__(
        self,
        folder: epath.Path,
        say: Callable[[str], None],
        *,
        first_step: int,
        last_step: int,
        num_steps: int = 3,
    ) -> None:
        """
        Args:
            first_step: after which the trace begins: those before it compile.
            last_step: of the run.
        """
        self._folder = folder
        self._say = say
        self._first = first_step
        self._last = min(first_step + num_steps, last_step)
        self._is_tracing = False

    def __enter__(self) -> Profile:
        if self._first >= self._last:
            self._say(
                f"--profile: there is nothing to trace, the run ends with step {self._last} and steps are "
                f"traced after step {self._first}; raise --steps"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_tracing:
            self._finish()

    def needs_state(self, step: int) -> bool:
        return self._first < self._last and step in (self._first, self._last)

    def __call__(self, run: Run, row: Row) -> None:
        if not self.needs_state(row["step"]):
            return
        if row["step"] == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True
        else:
            jax.block_until_ready(run.state)
            self._finish()

    def _finish(self) -> None:
        self._is_tracing = False
        jax.profiler.stop_trace()
        self._say(f"traced from step {self._first + 1} on: {self._folder}")
