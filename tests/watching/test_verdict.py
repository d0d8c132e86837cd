"""What is concluded from heartbeats."""

from __future__ import annotations

import dataclasses
import os
import subprocess

from sealion_jax.machine import process_start, this_machine
from sealion_jax.watching.beats import Beat
from sealion_jax.watching.verdict import (
    FAILED,
    OVERDUE,
    SILENT,
    Alarm,
    Findings,
    behind,
    can_be_killed_here,
    is_called_off,
    is_dead_here,
    verdict_of,
)

BEAT = Beat(
    attempt="a", process=0, processes=3, host="node0", pid=1, machine="elsewhere", process_start="1",
    started_at=0.0, doing="step 5", step=4, progress_at=100.0, moves=4, beat=9, beat_at=131.0,
    beat_seconds=4.0,
)  # fmt: skip


def beat(process: int, **values) -> Beat:
    return dataclasses.replace(BEAT, process=process, host=f"node{process}", **values)


def alarm(kind: str = SILENT, moves: int = 4) -> Alarm:
    return Alarm(kind=kind, by=0, reason="why", moves=moves)


def all_of(*beats: Beat) -> Findings:
    return Findings(heard={one.process: one for one in beats}, silent={})


def test_those_with_fewer_steps_or_other_work_are_behind():
    assert [one.process for one in behind([beat(0), beat(1, step=3), beat(2)])] == [1]
    assert [one.process for one in behind([beat(0), beat(1, step=None), beat(2)])] == [1]
    reading = beat(2, doing="step 5, reading a batch")
    assert [one.process for one in behind([beat(0), beat(1), reading])] == [2]
    assert behind([beat(0), beat(1)]) == []
    assert behind([beat(0), reading]) == []  # nothing says which of two waits for the other
    assert behind([]) == []


def test_silence_that_ends_is_called_off():
    assert is_called_off(alarm(), all_of(beat(0), beat(1), beat(2)))
    assert not is_called_off(alarm(), Findings(heard={0: beat(0)}, silent={1: beat(1)}))


def test_work_that_moved_on_is_called_off():
    assert is_called_off(alarm(OVERDUE), all_of(beat(0, moves=5), beat(1)))
    assert not is_called_off(alarm(OVERDUE), all_of(beat(0), beat(1, moves=5)))


def test_a_process_that_failed_is_never_called_off():
    assert not is_called_off(alarm(FAILED), all_of(beat(0), beat(1)))
    assert not is_called_off(alarm(), all_of(beat(0), beat(1, ended="ValueError: x")))
    assert is_called_off(alarm(), all_of(beat(0), beat(1, ended="done")))


def test_a_process_is_told_from_another_of_its_pid():
    own = beat(0, pid=os.getpid(), machine=this_machine(), process_start=process_start(os.getpid()))
    assert can_be_killed_here(own) and not is_dead_here(own)
    reused = dataclasses.replace(own, process_start="1")
    assert not can_be_killed_here(reused) and is_dead_here(reused)
    elsewhere = dataclasses.replace(own, machine="another")
    assert not can_be_killed_here(elsewhere) and not is_dead_here(elsewhere)
    unknown = dataclasses.replace(own, process_start="")
    assert not can_be_killed_here(unknown)
    ended = subprocess.Popen(["sleep", "60"])
    started = process_start(ended.pid)
    ended.kill()
    ended.wait()
    assert is_dead_here(dataclasses.replace(own, pid=ended.pid, process_start=started))


def test_the_verdict_names_who_is_silent_and_who_is_behind():
    findings = Findings(heard={0: beat(0), 2: beat(2, step=3, doing="saving")}, silent={1: beat(1), 3: None})
    verdict = verdict_of(alarm(), findings, run_dir="run")
    assert verdict["silent"] == [1, 3] and verdict["behind"] == [2]
    text = "\n".join(verdict["lines"])
    assert (
        "process 1 (pid 1 on node1): does not answer; last seen in step 5; only from its own machine" in text
    )
    assert "process 3: was never heard of" in text
    assert "process 2 (pid 1 on node2): in saving for 31 s" in text
    assert text.count("<- the others seem to wait for this one") == 1
    assert "2 of 4 processes do not answer" in text


def test_of_many_processes_those_behind_are_shown():
    many = [beat(number) for number in range(256)]
    many[200] = beat(200, step=3)
    lines = verdict_of(alarm(OVERDUE), all_of(*many), run_dir="run")["lines"]
    assert len(lines) < 15
    assert any("process 200" in line and "wait for this one" in line for line in lines)
    assert any("and 248 more that answer" in line for line in lines)
