"""How long things may take: by the median of steps, and on a clock that counts no sleep."""

from __future__ import annotations

import pytest

from sealion_jax.errors import UserError
from sealion_jax.watching import Activity, WatchConfig
from sealion_jax.watching.activity import Clock


class Time:
    """A monotonic clock that is set by hand, and the activity on it."""

    def __init__(self, **config: float | None) -> None:
        self.seconds = 1000.0
        self.clock = Clock(lambda: self.seconds, longest_gap_seconds=2.0)
        self.activity = Activity(WatchConfig(beat_seconds=1.0, silent_seconds=5.0, **config), self.clock)

    def passes(self, seconds: float) -> None:
        """As when the process is awake: the clock is looked at every second."""
        while seconds > 0:
            self.seconds += min(1.0, seconds)
            seconds -= 1.0
            self.clock.tick()


def test_a_step_is_hung_after_a_multiple_of_the_median_and_the_least():
    time = Time(hang_factor=10, least_seconds=30)
    time.activity.finished_step(0)
    for step, seconds in enumerate([4, 5, 6, 500], start=1):  # one slow step moves no median
        time.passes(seconds)
        time.activity.finished_step(step)
    assert time.activity.median_seconds == 5.5
    time.passes(54)
    assert time.activity.overdue() is None
    time.passes(2)
    assert time.activity.overdue() == (
        "step 5 has taken 56 s, and may take 55 s; the median of the last steps is 5.5 s"
    )


def test_quick_steps_have_the_least_seconds():
    time = Time(hang_factor=10, least_seconds=30)
    for step in range(1, 10):
        time.passes(0.1)
        time.activity.finished_step(step)
    time.passes(29)
    assert time.activity.overdue() is None
    time.passes(2)
    assert time.activity.overdue() is not None


def test_an_evaluation_has_its_own_limit_and_is_no_part_of_a_step():
    time = Time(least_seconds=30, phase_seconds=600)
    time.activity.finished_step(1)
    time.passes(5)
    with time.activity.during("evaluating"):
        time.passes(599)
        assert time.activity.doing.what == "evaluating"
        assert time.activity.overdue() is None
        time.passes(2)
        assert time.activity.overdue() == "evaluating has taken 601 s, and may take 600 s"
    assert time.activity.doing.what == "step 2"
    time.passes(29)
    assert time.activity.overdue() is None
    for step in (2, 3, 4):
        time.activity.finished_step(step)
    assert time.activity.median_seconds == 0  # of 29, 0 and 0: no evaluation is among them


def test_the_first_step_has_a_steps_limit_once_it_is_compiled():
    """The function that computes a step returns when devices compute; what hangs then is no compiler."""
    time = Time(least_seconds=30, phase_seconds=600)
    time.activity.begin("compiling", step=7)
    update = time.activity.stepping(lambda seconds: time.passes(seconds) or time.activity.doing.what)
    assert update(500) == "compiling" and time.activity.overdue() is None
    time.passes(29)
    assert time.activity.overdue() is None
    time.passes(2)
    assert time.activity.overdue() == "step 8 has taken 31 s, and may take 30 s"
    assert update(1) == "step 8"  # the next one, under way before the first has ended, moves nothing on
    assert time.activity.overdue() == "step 8 has taken 32 s, and may take 30 s"


def test_none_sets_no_limit():
    time = Time(least_seconds=None, phase_seconds=None)
    time.passes(10_000)
    assert time.activity.overdue() is None
    time.activity.finished_step(1)
    time.passes(10_000)
    assert time.activity.overdue() is None


def test_a_process_that_was_stopped_for_an_hour_was_not_hung_for_an_hour():
    time = Time(least_seconds=30)
    time.activity.finished_step(1)
    time.seconds += 3600
    time.clock.tick()
    assert time.activity.overdue() is None


def test_waiting_for_a_batch_is_told_and_is_time_of_the_step():
    time = Time(least_seconds=30)
    time.activity.finished_step(7)
    seen = []

    def batches():
        for number in range(2):
            time.passes(20)
            seen.append((time.activity.doing.what, time.activity.overdue()))
            yield number, {}

    assert [number for number, _ in time.activity.reading(batches())] == [0, 1]
    assert [what for what, _ in seen] == ["step 8, reading a batch"] * 2
    assert seen[0][1] is None
    assert seen[1][1] is not None and "step 8, reading a batch has taken 40 s" in seen[1][1]
    assert time.activity.doing.what == "step 8"


def test_long_work_that_moves_on_is_not_hung():
    time = Time(phase_seconds=60)
    time.activity.begin("reading the reference")
    for _ in range(10):
        time.passes(50)
        assert time.activity.overdue() is None
        time.activity.move_on()


@pytest.mark.parametrize(
    ("field", "value"),
    [("beat_seconds", 0.0), ("hang_factor", 1.0), ("least_seconds", -1.0), ("silent_seconds", 5.9)],
)
def test_settings_that_make_no_sense_are_refused(field, value):
    with pytest.raises(UserError, match=f"watch.{field}"):
        WatchConfig(**{field: value})
