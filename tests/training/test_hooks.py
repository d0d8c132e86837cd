"""The loop and its hooks: numbers one step late, the right state, one row a step, and when a run stops."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest
from etils import epath

from sealion_jax import metrics
from sealion_jax.errors import Preempted
from sealion_jax.metrics import MetricsLog, plain, read_rows
from sealion_jax.training import hooks
from sealion_jax.training.loop import Run, train
from sealion_jax.training.state import TrainState
from tests.tiny_run import scalars_of


def _run(steps: int, hooks_, *, start: int = 0, nonfinite=(), spikes=None):
    """A run whose parameter counts its updates, so that a hook can see which state it was given."""

    def update(state, step, batch):
        assert batch == {"number": int(step)}
        numbers = {"nonfinite": int(int(step) in nonfinite)}
        if spikes is not None:
            numbers |= {"spike": int(int(step) in spikes), "spike_limit": 0.5}
        return state._replace(params=state.params + 1), numbers

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


def test_skipped_updates_are_counted_in_all_and_in_a_row():
    run = _run(9, [hooks.CountSkipped(), hooks.GuardNonFinite(3, str)], nonfinite={1, 2, 4, 5, 8})
    assert run.counters == {"tokens": 45, "nonfinite": 5, "spikes": 0, "went_back": 0}
    assert run.skipped_in_a_row == 1


def test_a_skipped_update_always_has_its_row_and_is_in_the_totals(tmp_path):
    log = MetricsLog(epath.Path(tmp_path), last_step=-1)
    record = hooks.Record(log, lambda row: None, interval_steps=10, last_step=25)
    _run(25, [hooks.CountSkipped(), record], nonfinite={13}, spikes={12, 15})
    log.close()
    names = ("step", "spike", "nonfinite", "spikes_total", "nonfinite_total")
    assert [tuple(row[name] for name in names) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (10, 0, 0, 0, 0),
        (13, 1, 0, 1, 0),
        (14, 0, 1, 1, 1),
        (16, 1, 0, 2, 1),
        (20, 0, 0, 2, 1),
        (25, 0, 0, 2, 1),
    ]


@pytest.mark.parametrize(
    ("nonfinite", "spikes", "said"),
    [
        (
            range(3, 9),
            None,
            r"not finite 4 times .*saved\. Lower optimizer\.schedule\.peak_learning_rate, and run",
        ),
        (
            (3, 5),
            (1, 4, 6),
            r"not finite, or a spike \(2 of them; the limit is 0\.500\), 4 times in a row, from step 4 to 7; "
            r".*new stage of the mixture.*raise spikes\.deviations.* Else lower optimizer",
        ),
    ],
)
def test_what_stops_a_run_is_told_with_advice_that_fits(nonfinite, spikes, said):
    listeners = [hooks.CountSkipped(), hooks.GuardNonFinite(4, str)]
    with pytest.raises(hooks.NonFiniteError, match=said):
        _run(20, listeners, nonfinite=nonfinite, spikes=spikes)


def test_too_many_in_a_row_stop_the_run_and_show_the_first_batch(tmp_path):
    """Its last row is recorded, and none of these steps is saved."""
    log = MetricsLog(epath.Path(tmp_path), last_step=-1)
    saved: list[int] = []
    listeners = [
        hooks.CountSkipped(),
        hooks.Record(log, lambda row: None, interval_steps=1, last_step=20),
        hooks.GuardNonFinite(4, lambda step: f"batch {step}"),
        _saving(saved, interval_steps=2, last_step=20),
    ]
    with pytest.raises(
        hooks.NonFiniteError, match=r"4 times in a row, from step 6 to 9; .* after step 5,(?s:.*)batch 5$"
    ):
        _run(20, listeners, nonfinite=range(5, 20))
    log.close()
    assert saved == [2, 4]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["nonfinite_total"]) for row in rows[4:]] == [
        (5, 0),
        (6, 1),
        (7, 2),
        (8, 3),
        (9, 4),
    ]


class FakeStop:
    def __init__(self, at: int):
        self.at = at

    def requested(self, moment):
        return moment >= self.at


def _saving(saved: list[int], *, stop_at: int = 10**6, interval_steps: int, last_step: int) -> hooks.Save:
    return hooks.Save(
        lambda run: saved.append(int(run.state.params)),
        lambda: None,
        sync=lambda: None,
        stop=FakeStop(stop_at),
        interval_steps=interval_steps,
        last_step=last_step,
    )


@pytest.mark.parametrize(
    ("nonfinite", "stop_at", "expected"),
    [
        ({0, 4}, 10**6, [3, 6, 9, 10]),
        ({1, 2}, 10**6, [4, 6, 9, 10]),
        ({5, 6, 7, 8, 9}, 10**6, [3, 10]),
        ({1, 2, 3, 4, 5, 6, 7}, 5, [5, 6, 7, 8, 9, 10]),
    ],
    ids=["elsewhere", "made-up-for", "to-the-end", "asked-to-stop"],
)
def test_skipped_updates_are_not_saved_until_one_is_good(nonfinite, stop_at, expected):
    saved: list[int] = []
    save = _saving(saved, stop_at=stop_at, interval_steps=3, last_step=10)
    _run(10, [hooks.CountSkipped(), save], nonfinite=nonfinite)
    assert saved == expected


def test_a_stop_request_saves_then_ends_the_run():
    events: list[tuple[str, int]] = []
    stop = FakeStop(4)
    save = hooks.Save(
        lambda run: events.append(("save", run.step)),
        lambda: None,
        sync=lambda: events.append(("sync", 0)),
        stop=stop,
        interval_steps=3,
        last_step=9,
    )
    end = hooks.Stop(stop, lambda: events.append(("wait", 0)))
    with pytest.raises(Preempted, match="saved step 4 of 9"):
        _run(9, [save, end])
    assert events == [("sync", 0), ("save", 3), ("sync", 0), ("save", 4), ("wait", 0)]


def test_a_stop_request_before_the_first_step_does_not_claim_a_save():
    run, saved = Run(state=TrainState(params=0, optimizer=None), steps=9), []
    _saving(saved, stop_at=0, interval_steps=3, last_step=9)(run, {"step": 0})
    with pytest.raises(Preempted, match="before the first step, so there is nothing to save; run me again"):
        hooks.Stop(FakeStop(0), lambda: None)(run, {"step": 0})
    assert saved == []


class Profiling:
    """What a profile does to JAX's profiler, what it tells, and the steps, as a list of events."""

    def __init__(self, monkeypatch, *, first_step: int, last_step: int):
        self.events: list[str | int] = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: self.events.append(f"start {folder}"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.events.append("stop"))
        self.hook = hooks.Profile(
            epath.Path("p"), self.events.append, first_step=first_step, last_step=last_step
        )

    def needs_state(self, step):
        return False

    def __call__(self, run, row):
        self.events.append(row["step"])

    def run(self, steps: int, *others) -> list[str | int]:
        with self.hook:
            _run(steps, [self.hook, self, *others])
        return self.events


@pytest.mark.parametrize(("last_step", "stops"), [(9, 5), (5, 5), (4, 4), (3, 3)])
def test_a_profile_is_written_at_the_latest_with_the_last_step(monkeypatch, last_step, stops):
    events = Profiling(monkeypatch, first_step=2, last_step=last_step).run(last_step)
    start, stop = events.index("start p"), events.index("stop")
    assert (events[start + 1], events[stop + 2]) == (2, stops)
    assert events[stop + 1] == "traced from step 3 on: p"
    assert (events.count("start p"), events.count("stop")) == (1, 1)


@pytest.mark.parametrize("last_step", [1, 2])
def test_a_profile_of_too_few_steps_is_told(monkeypatch, last_step):
    told, *steps = Profiling(monkeypatch, first_step=2, last_step=last_step).run(last_step)
    assert f"nothing to trace, the run ends with step {last_step}" in told
    assert steps == list(range(1, last_step + 1))


@pytest.mark.parametrize(
    ("stop_at", "expected"), [(3, ["stop", "traced from step 3 on: p"]), (1, []), (6, [])]
)
def test_a_profile_is_written_when_the_run_ends_in_its_midst(monkeypatch, stop_at, expected):
    profiling = Profiling(monkeypatch, first_step=2, last_step=9)
    with pytest.raises(Preempted):
        profiling.run(9, hooks.Stop(FakeStop(stop_at), lambda: None))
    assert profiling.events.count("stop") == (stop_at > 2)
    assert profiling.events[-2:] == expected or not expected


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
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [(row["step"], row["time"]) for row in rows] == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 200.0)]
    expected = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert scalars_of(tmp_path / "tensorboard")["loss"] == expected


@pytest.mark.parametrize(
    "damage",
    [
        (b'"loss": 3.0', b'"loss": \xb3.0'),
        (b'"loss": 3.0', b'"los\xf3": 3.0'),
        (b'"step": 3', b'"spep": 3'),
        (b'{"step": 3,', b"3,"),
        (b'{"step": 3, "loss": 3.0}', b"[]"),
        (b'"loss": 3.0', b'"loss": NaN'),
        (b'"loss": 3.0', b'"loss": "\\ud83d"'),
        (b'{"step": 3, "loss": 3.0}', b"\0" * 24),
    ],
)
def test_a_damaged_line_takes_no_other_with_it_and_is_told(tmp_path, capsys, damage):
    whole = b"".join(b'{"step": %d, "loss": %d.0}\n' % (step, step) for step in range(1, 6))
    (tmp_path / "metrics.jsonl").write_bytes(whole.replace(*damage) + b'{"step": 6, "lo')
    log = MetricsLog(epath.Path(tmp_path), last_step=5)
    log.close()
    assert "metrics.jsonl: 1 of 5 lines are damaged, and left out\n" in capsys.readouterr().err
    expected = b"".join(line for line in whole.splitlines(keepends=True) if b'"step": 3' not in line)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected
    assert read_rows(epath.Path(tmp_path) / "metrics.jsonl") == log.rows
    assert capsys.readouterr().err == "", "it is told once"


def test_rows_are_on_disk_before_a_save_and_before_the_file_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    synced: list[tuple[int, int, bool]] = []

    def note(number: int) -> None:
        file = os.fstat(number)
        synced.append((file.st_ino, file.st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n')
    path.rename(old := tmp_path / "metrics.jsonl.old")
    monkeypatch.setattr(metrics, "read_rows", lambda _: read_rows(old))
    log = MetricsLog(epath.Path(tmp_path), last_step=1)
    log.append({"step": 2, "loss": 1.5})
    log.sync()
    log.close()
    size = path.stat().st_size
    # TensorBoard's writer syncs its own file.
    assert [rest for inode, *rest in synced if inode == path.stat().st_ino] == [
        [size // 2, False],
        [size, True],
    ]


def test_tensorboard_is_written_anew_in_one_go(tmp_path, monkeypatch):
    from tensorboardX import FileWriter

    flushes: list[int] = []
    monkeypatch.setattr(FileWriter, "flush", lambda self: flushes.append(1))
    rows = [{"step": step, "loss": 1.0, "eval/web:id/loss": 2.0, "n": 3} for step in range(1, 51)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = MetricsLog(epath.Path(tmp_path), last_step=50)
    assert len(flushes) == 1
    log.append({"step": 51, "loss": None, "n": 4})
    assert len(flushes) == 2
    log.close()
    scalars = scalars_of(tmp_path / "tensorboard")
    assert {name: len(values) for name, values in scalars.items()} == {
        "loss": 50,
        "eval/web:id/loss": 50,
        "n": 51,
    }
    assert scalars["n"][-1] == (51, 4.0)


def test_numbers_that_are_not_finite_stay_json():
    row = plain({"loss": float("nan"), "grad_norm": float("inf"), "step": 3})
    assert json.loads(json.dumps(row, allow_nan=False)) == {"loss": None, "grad_norm": None, "step": 3}
