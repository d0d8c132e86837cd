"""A run over two nodes of a real Slurm is the run of one process, also when a task of it was killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.disturbances import disturb
from tests.slurm.drill import ROUNDING
from tests.slurm.real_slurm import Job, Settings, Slurm, cluster, difference, missing_for_slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_for_slurm() is not None, reason=str(missing_for_slurm())),
]

SETTINGS = Settings(steps=40, batch=16, interval=5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm"), SETTINGS) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm) -> dict[int, Job]:
    """The run on two nodes and, beside it, on one."""
    jobs = {nodes: slurm.train(f"undisturbed_{nodes}", nodes=nodes, devices=4 // nodes) for nodes in (2, 1)}
    for job in jobs.values():
        assert job.finish() == "COMPLETED", f"{job.log}\n{job.rank_log(0)}"
    return jobs


def test_two_nodes_equal_one_process(undisturbed: dict[int, Job]) -> None:
    two, one = undisturbed[2], undisturbed[1]
    assert "2 processes on 2 nodes, 2 cpu devices each" in two.rank_log(0)
    assert difference(two.run_dir, one.run_dir, steps=SETTINGS.steps) < ROUNDING
    assert (two.restarts, one.restarts) == (0, 0)


def test_a_killed_task_ends_in_a_requeued_job_that_shows_nothing_of_it(slurm, undisturbed) -> None:
    outcome = disturb(slurm, "task", undisturbed[2])
    assert outcome.ended == "failed with code 137"
    assert outcome.restarts == 1
    assert outcome.is_right, outcome
