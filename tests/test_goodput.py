"""Where a run's time went: the account of one session, and of several with steps lost between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from sealion_jax.goodput import KINDS, Ledger, Session, account, goodput, read_sessions, table
from sealion_jax.run.accounting import kind_of
from sealion_jax.watching import Activity, WatchConfig
from sealion_jax.watching.activity import Clock


class Time:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_books_all_the_time_that_passes():
    clock = Time()
    ledger = Ledger(started_at=990.0, now=clock)
    for kind, seconds in (
        ("start", 5),
        ("restore", 3),
        ("compile", 20),
        ("steps", 7),
        ("data", 1),
        ("steps", 2),
    ):
        ledger.turn_to(kind)
        clock.now += seconds
    ledger.begin(10)
    ledger.finished_step(14)
    (session,) = ledger.sessions
    assert session.seconds == {"start": 15, "restore": 3, "compile": 20, "steps": 9, "data": 1}
    assert (session.began_after, session.reached) == ((10,), (14,))
    assert (session.started_at, session.updated_at) == (990.0, 1038.0)
    assert sum(account([session]).values()) == 48
    assert goodput(account([session])) == 9 / 48


def test_steps_that_were_not_saved_and_the_time_between_sessions_are_no_goodput():
    first = Session(
        started_at=0, updated_at=100, began_after=(0,), reached=(40,), seconds={"start": 20, "steps": 80}
    )
    second = Session(
        started_at=130, updated_at=200, began_after=(30,), reached=(60,), seconds={"start": 10, "steps": 60}
    )
    totals = account([first, second])
    assert totals["lost steps"] == 20  # 10 of 40 steps that took 80 s
    assert totals["between sessions"] == 30
    assert totals["steps"] == 60 + 60
    assert sum(totals.values()) == 200
    assert goodput(totals) == 0.6


def test_a_session_that_went_back_lost_what_it_does_again():
    session = Session(
        started_at=0, updated_at=90, began_after=(0, 10), reached=(20, 35), seconds={"steps": 90}
    )
    totals = account([session])
    assert totals["lost steps"] == 20  # 10 of 45 steps
    assert totals["steps"] == 70


@pytest.mark.parametrize(
    ("stretches", "useful", "steps"),
    [
        ([(0, 100), (50, 60), (40, 100)], [40, 0, 60], 100),
        ([(0, 210), (100, 150), (50, 200)], [50, 0, 150], 200),
        ([(0, 30), (20, 20), (25, 40)], [20, 0, 15], 35),
    ],
)
def test_steps_are_lost_to_whatever_stretch_went_back_furthest(stretches, useful, steps):
    """Also over a stretch that ended before it came so far, and whether sessions or one session went back."""
    alone = [
        Session(
            started_at=k, updated_at=k, began_after=(first,), reached=(last,), seconds={"steps": last - first}
        )
        for k, (first, last) in enumerate(stretches)
    ]
    totals = account(alone)
    assert totals["steps"] == sum(useful) == steps
    assert totals["steps"] + totals["lost steps"] == sum(last - first for first, last in stretches)
    firsts, lasts = zip(*stretches, strict=True)
    whole = sum(session.seconds["steps"] for session in alone)
    together = Session(
        started_at=0, updated_at=9, began_after=firsts, reached=lasts, seconds={"steps": whole}
    )
    assert account([together]) == pytest.approx(totals | {"between sessions": 0})


def test_a_session_that_died_before_its_first_step_loses_none():
    sessions = [
        Session(started_at=0, updated_at=10, seconds={"start": 10}),
        Session(started_at=20, updated_at=30, began_after=(5,), reached=(5,), seconds={"compile": 10}),
        Session(started_at=40, updated_at=50, began_after=(5,), reached=(9,), seconds={"steps": 10}),
    ]
    totals = account(sessions)
    assert totals["lost steps"] == 0
    assert (totals["start"], totals["compile"], totals["between sessions"]) == (10, 10, 20)


def test_the_account_is_written_at_once_in_turns_and_at_the_end(tmp_path):
    """Also while the run does one thing for long, such as its first compilation, in which it may die."""
    clock = Time()
    ledger = Ledger("one", now=clock, every_seconds=0.01)
    with ledger.kept(tmp_path, earlier=[]):
        assert read_sessions(tmp_path) == ledger.sessions, "at once"
        ledger.turn_to("compile")
        clock.now += 100
        _wait_until(lambda: read_sessions(tmp_path)[0].seconds.get("compile") == 100)
        ledger.begin(0)
        ledger.finished_step(3)
        _wait_until(lambda: read_sessions(tmp_path)[0].reached == (3,))
    slow = Ledger("two", now=clock)
    with slow.kept(tmp_path, earlier=read_sessions(tmp_path)):
        clock.now += 5
    assert read_sessions(tmp_path) == slow.sessions
    assert [session.seconds["start"] for session in slow.sessions] == [0, 5]
    assert read_sessions(tmp_path / "nowhere") == []


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_account_that_cannot_be_written_stops_no_run(tmp_path):
    (tmp_path / "goodput").write_text("a file in the way")
    with Ledger().kept(tmp_path, earlier=[]):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b'{"started_at": 1',
        b'{"started_at": 1, "updated_at": 2, "began_after": [0, 5], "reached": [7]}',
        b'{"started_at": 1, "updated_at": 2, "began_after": [9], "reached": [7]}',
        b'{"started_at": 1, "updated_at": 2, "seconds": {"steps": NaN}}',
        b'{"started_at": 1, "updated_at": 2, "seconds": {"step\xff": 3}}',
        b"[]",
    ],
)
def test_an_account_that_is_damaged_is_told_and_left_out(tmp_path, content):
    with Ledger("good").kept(tmp_path, earlier=[]):
        pass
    (tmp_path / "goodput" / "bad.json").write_bytes(content)
    told: list[str] = []
    sessions = read_sessions(tmp_path, report=told.append)
    assert len(sessions) == 1 and account(sessions)
    (line,) = told
    assert "goodput/bad.json is damaged, and left out: " in line


def test_what_a_run_does_has_its_kind():
    activity = Activity(WatchConfig(), Clock(Time(), longest_gap_seconds=10.0))
    told: list[str] = []
    activity.listener = lambda doing: told.append(kind_of(doing))
    activity.begin("building")
    activity.begin("restoring")
    activity.begin("compiling", step=0)
    batches = activity.reading(iter([(0, None), (1, None)]))
    next(batches)
    activity.finished_step(1)
    next(batches)
    with activity.during("evaluating"):
        pass
    with activity.during("something new"):
        pass
    assert [kind for kind, before in zip(told, [None, *told], strict=False) if kind != before] == [
        *("start", "restore", "compile", "data", "compile", "steps", "data", "steps"),
        *("evaluation", "steps", "other", "steps"),
    ]
    assert set(told) <= set(KINDS)


@pytest.mark.parametrize(
    "totals", [dict.fromkeys(KINDS, 0.0), {**dict.fromkeys(KINDS, 0.0), "steps": 90.0, "save": 10.0}]
)
def test_the_table_has_what_took_time(totals):
    lines = table(totals).splitlines()
    assert len(lines) == 1 + sum(seconds > 0 for seconds in totals.values())
    assert lines[0].startswith(f"goodput {90 if totals['steps'] else 0:.1f}%")
