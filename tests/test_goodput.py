"""Where a run's time went: the account of one session, and of several with steps lost between them."""

from __future__ import annotations

import json

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
    time = Time()
    ledger = Ledger(started_at=990.0, now=time)
    for kind, seconds in (
        ("start", 5),
        ("restore", 3),
        ("compile", 20),
        ("steps", 7),
        ("data", 1),
        ("steps", 2),
    ):
        ledger.turn_to(kind)
        time.now += seconds
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


def test_a_session_that_died_before_its_first_step_loses_none():
    sessions = [
        Session(started_at=0, updated_at=10, seconds={"start": 10}),
        Session(started_at=20, updated_at=30, began_after=(5,), reached=(5,), seconds={"compile": 10}),
        Session(started_at=40, updated_at=50, began_after=(5,), reached=(9,), seconds={"steps": 10}),
    ]
    totals = account(sessions)
    assert totals["lost steps"] == 0
    assert (totals["start"], totals["compile"], totals["between sessions"]) == (10, 10, 20)


def test_the_account_is_written_every_few_seconds_and_read_back(tmp_path):
    time = Time()
    ledger = Ledger("one", now=time, every_seconds=10)
    (tmp_path / "goodput").mkdir()
    (tmp_path / "goodput" / "torn.json").write_text('{"started_at": 1')
    ledger.keep(tmp_path, earlier=read_sessions(tmp_path))
    ledger.begin(0)
    ledger.turn_to("steps")
    written = []
    for step in range(1, 13):
        time.now += 2
        ledger.finished_step(step)
        (session,) = read_sessions(tmp_path)
        written.append(session.reached[0])
    assert written == [1, 1, 1, 1, 1, 6, 6, 6, 6, 6, 11, 11]
    ledger.write()
    assert read_sessions(tmp_path) == ledger.sessions
    assert json.loads((tmp_path / "goodput" / "one.json").read_text())["seconds"]["steps"] == 24
    assert read_sessions(tmp_path / "nowhere") == []


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
