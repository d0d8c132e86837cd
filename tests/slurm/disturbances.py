"""What may happen to a run on a cluster, done to a tiny one; each says what came of it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.slurm.real_slurm import Job, Slurm, difference, kill_hard, same_weights, starts_from


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's end, and whether it is what it would have been."""

    case: str
    ended: str
    """How the first start ended, as the batch script or Slurm had it."""
    state: str
    """Slurm's word for the job in the end."""
    restarts: int
    went_on_after: list[int]
    """The steps from which later starts went on."""
    seconds: float
    """From the submission to the end."""
    loss_difference: float
    """From the undisturbed run's, relative, the largest of all steps; 0.0 is every bit."""
    weights_equal: bool
    """Every bit of the weights and of the optimizer's state."""
    notes: list[str]

    steps: int
    """Of the whole run."""

    @property
    def is_right(self) -> bool:
        """Whether the run was disturbed, went on with steps to do, and nothing shows it."""
        return (
            self.state == "COMPLETED"
            and self.restarts >= 1
            and len(self.went_on_after) >= 1
            and self.went_on_after[0] < self.steps
            and self.loss_difference == 0.0
            and self.weights_equal
        )


def asked_to_stop(slurm: Slurm) -> tuple[Job, list[str]]:
    """`scancel --signal=TERM`, in the middle."""
    job = slurm.train("asked_to_stop")
    _wait_for_middle(job)
    slurm.call("scancel", "--signal=TERM", job.number)
    return job, []


def killed_task(slurm: Slurm) -> tuple[Job, list[str]]:
    """SIGKILL of rank 1, in the middle."""
    job = slurm.train("killed_task")
    _wait_for_middle(job)
    kill_hard(job.tasks()[1])
    killed = time.monotonic()
    job.wait_for("end of the other rank", lambda: not job.tasks(), seconds=60)
    return job, [f"the other rank was gone after {time.monotonic() - killed:.0f} s"]


def killed_slurmd(slurm: Slurm) -> tuple[Job, list[str]]:
    """SIGKILL of the slurmd of rank 0's node, whose task and batch script outlive it."""
    job = slurm.train("killed_slurmd")
    _wait_for_middle(job)
    return job, _kill_slurmd(job)


def frozen_node(slurm: Slurm) -> tuple[Job, list[str]]:
    """A node that stands still, slurmd and task, until its job is done elsewhere, and then wakes up."""
    job = slurm.train("frozen_node", nodes=1, devices=4)
    _wait_for_middle(job)
    task = job.tasks()[0]
    kill_hard(job.slurmd_pid(job.fields()["BatchHost"]))
    os.kill(task, signal.SIGSTOP)
    job.wait_for("restart", lambda: job.restarts == 1, seconds=120)
    job.finish()
    assert job.tasks().get(0) == task, "the old task was to be there still"
    os.kill(task, signal.SIGCONT)
    woken = time.monotonic()
    job.wait_for("end of the old task", lambda: not job.tasks(), seconds=120)
    seconds = time.monotonic() - woken
    job.slurm.bring("up")
    log = job.rank_log(0)
    assert "an earlier start of this job" in log, log
    assert "a later start of this job" in log and "writes nothing more" in log, log
    return job, [f"the old task woke up, trained on, and {seconds:.0f} s later its save was refused"]


def time_limit(slurm: Slurm) -> tuple[Job, list[str]]:
    """A limit with a warning before it, which comes before an undisturbed run would be done.

    Slurm looks twice a minute, and tells half a minute early rather than late; limits are whole minutes. A
    run that was faster is tried again.
    """
    earliest = max(15, round(0.4 * slurm.undisturbed_seconds))
    minutes = math.ceil((earliest + 50) / 60)
    warning = 60 * minutes - earliest - 30
    for attempt in range(3):
        job = slurm.train(f"time_limit_{attempt}", f"--time={minutes}", f"--signal=TERM@{warning}")
        job.finish(seconds=900)
        if job.restarts > 0:
            break
    return job, [f"limit {minutes} min, told {warning} s before it"]


def preempted(slurm: Slurm) -> tuple[Job, list[str]]:
    """A job of a partition that goes first wants the nodes, in the middle."""
    job = slurm.train("preempted")
    _wait_for_middle(job)
    urgent = slurm.call(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"),
        *(f"--output={slurm.folder}/urgent.out", "--wrap=sleep 5"),
    )
    job.wait_for("preemption", lambda: job.restarts == 1, seconds=120)
    return job, [f"job {urgent.strip()} took its nodes for 5 s"]


DISTURBANCES: dict[str, tuple[str, Callable[[Slurm], tuple[Job, list[str]]], int]] = {
    "asked": ("`scancel --signal=TERM`", asked_to_stop, 2),
    "task": ("a task killed (SIGKILL of rank 1)", killed_task, 2),
    "slurmd": ("a slurmd killed (rank 0's node)", killed_slurmd, 2),
    "time": ("the time limit", time_limit, 2),
    "preempted": ("preempted by another job", preempted, 2),
    "frozen": ("a node frozen until its job was done elsewhere (run of one node)", frozen_node, 1),
}
"""Name -> (title, what is done, nodes of the undisturbed run that it is compared with)."""


def disturb(slurm: Slurm, name: str, reference: Job) -> Outcome:
    """What came of one disturbance, compared with the undisturbed run on as many nodes."""
    title, act, _ = DISTURBANCES[name]
    job, notes = act(slurm)
    state = job.finish()
    assert state == "COMPLETED", f"{state}\n{job.log}\n{job.rank_log(0)}"
    steps = slurm.settings.steps
    return Outcome(
        case=title,
        ended=_first_end(job),
        state=state,
        restarts=job.restarts,
        went_on_after=starts_from(job),
        seconds=time.time() - job.submitted,
        loss_difference=difference(job.run_dir, reference.run_dir, steps=steps),
        weights_equal=same_weights(job.run_dir, reference.run_dir, steps=steps),
        notes=notes,
        steps=steps,
    )


def _wait_for_middle(job: Job) -> None:
    """Until two checkpoints are complete; by then the run has most of its steps before it."""
    job.wait_for_step(2 * job.slurm.settings.interval)


def _kill_slurmd(job: Job) -> list[str]:
    """Kills the batch host's slurmd, and waits until the job was started again and the old tasks are gone."""
    host = job.fields()["BatchHost"]
    rank_0 = job.tasks()[0]
    kill_hard(job.slurmd_pid(host))
    killed = time.monotonic()
    time.sleep(2)
    assert job.tasks().get(0) == rank_0, f"rank 0 of {host} was to outlive its slurmd"
    ends: dict[str, float] = {}

    def is_over() -> bool:
        if not job.tasks():
            ends.setdefault("old", time.monotonic() - killed)
        if job.restarts == 1 and job.tasks(start=1):
            ends.setdefault("new", time.monotonic() - killed)
        return len(ends) == 2

    job.wait_for("restart, and end of the old tasks", is_over, seconds=180)
    job.slurm.bring("up")
    return [f"started again after {ends['new']:.0f} s; old rank 0 ended after {ends['old']:.0f} s"]


def _first_end(job: Job) -> str:
    """What ended the first start."""
    for line in job.log.splitlines():
        if "start 1:" in line and ("stopped and saved" in line or "failed with code" in line):
            return line.split("start 1: ")[1].split(" (")[0]
        if "DUE TO" in line:
            return line.split("DUE TO ")[1].strip(" *").lower()
    return "ended by Slurm"
