"""The loop and its hooks: numbers one step late, the right state, one row a step, and when a run stops."""

from __future__ import annotations

import json

import numpy as np
import pytest
from etils import epath

from sealion_jax.errors import Preempted
from sealion_jax.metrics import MetricsLog, plain, read_metrics
from sealion_jax.training import hooks
from sealion_jax.training.loop import Run, train
from sealion_jax.training.state import TrainState
from tests.tiny_run import scalars_of


def _run(steps: int, hooks_, *, start: int = 0, nonfinite=()):
    """A run whose parameter counts its updates, so that a hook can see which state it was given."""

    def update(state, step, batch):
        assert batch == {"number": int(step)}
        return state._replace(params=state.params + 1), {"nonfinite": int(int(step) in nonfinite)}

    run = Run(state=TrainState(params=np.int64(start), optimizer=None), steps=steps, step=start)
    train(
        run,
        update,
        batches=((step, {"number": step}) for step in range(start, 10**6)),
        to_device=lambda batch: batch,
        summarise=lambda metrics: {"tokens": 5, "loss": 1.0, **metrics},
        hooks=hooks_,
    )
    return run


class Watch:
    """Notes what it is called with; wants the exact state every `interval` steps."""

    def __init__(self, interval: int = 0):
        self.interval = interval
        self.calls: list[tuple[int, int]] = []

    def needs_state(self, step):
        return bool(self.interval) and step % self.interval == 0

    def __call__(self, run, row):
        self.calls.append((row["step"], int(run.state.params)))


def test_numbers_come_one_step_late_and_every_step_once():
    watch = Watch()
    assert _run(5, [watch]).step == 5
    # While step n + 1 computes, the row of step n is handled.
    assert watch.calls == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]


def test_a_hook_that_needs_the_state_gets_exactly_that_state():
    watch = Watch(interval=3)
    _run(7, [watch], start=1)
    assert [step for step, _ in watch.calls] == [2, 3, 4, 5, 6, 7]
    assert {step: seen for step, seen in watch.calls if step % 3 == 0} == {3: 3, 6: 6}


def test_ten_in_a_row_stop_the_run_and_name_the_batch():
    guard = hooks.GuardNonFinite(3, lambda step: f"documents of batch {step}")
    # Interrupted series do not count together.
    run = _run(9, [guard], nonfinite={1, 2, 4, 5})
    assert run.counters == {"tokens": 45, "nonfinite": 4, "nonfinite_in_a_row": 0}
    with pytest.raises(hooks.NonFiniteError, match=r"step 7: .* 3 times in a row(?s:.*)documents of batch 6"):
        _run(9, [hooks.GuardNonFinite(3, lambda step: f"documents of batch {step}")], nonfinite={4, 5, 6})


class FakeStop:
    def __init__(self, at: int):
        self.at = at

    def requested(self, step):
        return step >= self.at


def test_a_stop_request_saves_then_ends_the_run():
    events: list[tuple[str, int]] = []
    stop = FakeStop(4)
    save = hooks.Save(
        lambda run: events.append(("save", run.step)), lambda: None, stop, interval_steps=3, last_step=9
    )
    end = hooks.Stop(stop, lambda: events.append(("wait", 0)))
    with pytest.raises(Preempted, match="saved step 4 of 9"):
        _run(9, [save, end])
    assert events == [("save", 3), ("save", 4), ("wait", 0)]


def test_evaluations_are_before_every_so_often_and_after():
    evaluate = hooks.Evaluate(lambda params: {"eval/x/loss": float(params)}, interval_steps=4, last_step=10)
    rows: list[dict] = []

    class Keep(Watch):
        def __call__(self, run, row):
            rows.append(row)

    _run(10, [evaluate, Keep()])
    assert {row["step"]: row["eval/x/loss"] for row in rows if "eval/x/loss" in row} == {
        4: 4.0,
        8: 8.0,
        10: 10.0,
    }
    assert evaluate.needs_state(0)


def test_metrics_log_keeps_one_row_a_step_over_a_crash(tmp_path):
    run_dir = epath.Path(tmp_path)
    log = MetricsLog(run_dir, last_step=0)
    for step in range(1, 6):
        log.append({"step": step, "loss": 1.0 / step, "time": 100.0 + step})
    log.close()
    # A crash in the middle of a line, after steps that no checkpoint holds.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(run_dir, last_step=3)
    log.append({"step": 4, "loss": 0.25, "time": 200.0})
    log.close()
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [(row["step"], row["time"]) for row in rows] == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 200.0)]
    expected = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert scalars_of(tmp_path / "tensorboard")["loss"] == expected


def test_numbers_that_are_not_finite_stay_json():
    row = plain({"loss": float("nan"), "grad_norm": float("inf"), "step": 3})
    assert json.loads(json.dumps(row, allow_nan=False)) == {"loss": None, "grad_norm": None, "step": 3}
