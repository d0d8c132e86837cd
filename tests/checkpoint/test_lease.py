"""One writer a run directory: who is refused, who takes over and when, and that nobody writes after that."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sealion_jax.checkpoint.lease import LeaseLostError, RunLease
from sealion_jax.checkpoint.lease_files import JobStart, LeaseFiles, LeaseRecord
from sealion_jax.errors import UserError


@pytest.fixture(params=["disk", "objects"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A run directory on the disk, and one on a store of objects (as gs:// is)."""
    if request.param == "disk":
        yield str(tmp_path / "run")
    else:
        url = f"memory://{uuid.uuid4().hex}/run"
        yield url
        fs, path = fsspec.core.url_to_fs(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _lease(
    run_dir: str, *, heartbeat: float = 0.05, stale_after: float = 60.0, start: JobStart | None = None
) -> RunLease:
    return RunLease(
        run_dir,
        start=start,
        heartbeat_seconds=heartbeat,
        stale_after_seconds=stale_after,
        report=lambda line: None,
    )


def _leave(run_dir: str, *, age_seconds: float = 0.0, **changes: object) -> LeaseRecord:
    """A lease as another machine's run would leave it, `age_seconds` after its last heartbeat."""
    files = LeaseFiles(f"{run_dir}/lease")
    newest = files.newest()
    record = files.create(1 if newest is None else newest.token + 1, owner=uuid.uuid4().hex)
    assert record is not None
    then = time.time() - age_seconds
    elsewhere = {"host": "node7", "machine": "another boot", "pid": 4321, "acquired_at": then}
    record = dataclasses.replace(record, heartbeat_at=then, **{**elsewhere, **changes})
    files.overwrite(record)
    return record


def test_a_second_run_is_refused_and_told_by_whom(run_dir: str) -> None:
    with _lease(run_dir) as first:
        assert first.token == 1
        started = time.monotonic()
        with pytest.raises(UserError) as error, _lease(run_dir):
            pass
        assert time.monotonic() - started < 2
        first.check()
    for part in (run_dir, f"pid {os.getpid()}", "since 20", "Wait for it or stop it", "--run-dir"):
        assert part in str(error.value)


def test_given_back_it_is_free_at_once_and_tokens_grow(run_dir: str) -> None:
    for token in (1, 2, 3):
        with _lease(run_dir) as lease:
            assert lease.token == token
        assert lease.token is None


def test_the_heartbeat_is_renewed_and_stops_in_the_end(run_dir: str) -> None:
    files = LeaseFiles(f"{run_dir}/lease")
    with _lease(run_dir):
        first = files.newest()
        time.sleep(0.4)
        later = files.newest()
    assert first and later and later.heartbeat_at > first.heartbeat_at
    assert later.acquired_at == first.acquired_at
    assert "run-lease" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_run_on_this_machine_is_taken_over_at_once(reaped: bool, tmp_path: Path) -> None:
    script = f"""
import time
from sealion_jax.checkpoint.lease import RunLease
with RunLease({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout and run.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by pid {run.pid} on "), _lease(str(tmp_path)):
            pass
        run.send_signal(signal.SIGKILL)
        if reaped:
            run.wait()
        else:
            while Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
        started = time.monotonic()
        with _lease(str(tmp_path)) as lease:
            assert lease.token == 2
            assert time.monotonic() - started < 1
    finally:
        run.kill()
        run.wait()


def test_a_pid_that_now_belongs_to_another_process_is_a_dead_run(run_dir: str) -> None:
    with _lease(run_dir):
        own = LeaseFiles(f"{run_dir}/lease").newest()
    assert own is not None
    _leave(run_dir, machine=own.machine, pid=os.getppid(), process_start="1", host=own.host)
    with _lease(run_dir) as lease:
        assert lease.token == 3


def test_a_silent_lease_of_another_machine_is_taken_over_at_once_when_it_is_old(run_dir: str) -> None:
    _leave(run_dir, age_seconds=601)
    started = time.monotonic()
    with _lease(run_dir) as lease:
        assert lease.token == 2
    assert time.monotonic() - started < 1


def test_a_fresh_lease_of_another_machine_is_waited_for(run_dir: str) -> None:
    _leave(run_dir, age_seconds=-3600)  # its clock is an hour ahead of ours: only ours counts
    lines: list[str] = []
    started = time.monotonic()
    with RunLease(run_dir, heartbeat_seconds=0.05, stale_after_seconds=0.5, report=lines.append) as lease:
        assert lease.token == 2
    assert 0.5 < time.monotonic() - started < 3
    assert len(lines) == 1 and "last used by pid 4321 on node7" in lines[0]


@pytest.mark.parametrize("behind_seconds", [0, 300])
def test_a_live_run_on_another_machine_is_seen_to_live(behind_seconds: int, run_dir: str) -> None:
    """Also where its clock is some minutes behind ours."""
    record = _leave(run_dir, age_seconds=behind_seconds)
    files = LeaseFiles(f"{run_dir}/lease")
    beat = threading.Timer(
        0.3,
        lambda: files.overwrite(dataclasses.replace(record, heartbeat_at=time.time() - behind_seconds)),
    )
    beat.start()
    started = time.monotonic()
    with pytest.raises(UserError, match="in use by pid 4321 on node7"), _lease(run_dir):
        pass
    assert time.monotonic() - started < 5
    beat.join()


def test_a_holder_that_was_taken_over_may_not_go_on(run_dir: str) -> None:
    with _lease(run_dir, heartbeat=3600) as first:
        files = LeaseFiles(f"{run_dir}/lease")
        record = files.newest()
        assert record is not None
        asleep = {"heartbeat_at": time.time() - 1000, "machine": "another boot"}
        files.overwrite(dataclasses.replace(record, **asleep))
        with _lease(run_dir) as second:
            assert second.token == 2
            with pytest.raises(LeaseLostError, match="was taken over by pid"):
                first.check()
            first.release()
            second.check()
            newest = files.newest()
            assert newest is not None and (newest.token, newest.released) == (2, False)


def test_a_holder_hears_of_a_takeover_with_its_next_heartbeat(run_dir: str) -> None:
    heard: list[LeaseLostError] = []
    lost = threading.Event()
    with RunLease(
        run_dir, heartbeat_seconds=0.05, on_lost=lambda error: (heard.append(error), lost.set()), report=print
    ):
        _leave(run_dir)
        assert lost.wait(10)
    assert "was taken over by pid 4321 on node7" in str(heard[0])


def test_the_same_number_of_another_owner_is_a_takeover(run_dir: str) -> None:
    """Somebody removed the lease while a run lived, and a second run began with number 1 as well."""
    with _lease(run_dir, heartbeat=3600) as lease:
        system, path = fsspec.core.url_to_fs(f"{run_dir}/lease")
        system.rm(path, recursive=True)
        assert _leave(run_dir).token == lease.token == 1
        with pytest.raises(LeaseLostError, match="was taken over by pid 4321 on node7"):
            lease.check()


def test_a_heartbeat_after_the_takeover_changes_nothing(run_dir: str) -> None:
    with _lease(run_dir, heartbeat=0.2) as first:
        other = _leave(run_dir)
        time.sleep(0.5)
        assert LeaseFiles(f"{run_dir}/lease").newest() == other
        with pytest.raises(LeaseLostError):
            first.check()


def test_of_many_that_start_together_one_wins(run_dir: str) -> None:
    _leave(run_dir, age_seconds=1000)
    barrier = threading.Barrier(8)
    tokens: list[int | None] = []
    refused: list[str] = []
    leases = [_lease(run_dir) for _ in range(8)]

    def start(lease: RunLease) -> None:
        barrier.wait()
        try:
            lease.__enter__()
            tokens.append(lease.token)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lease in leases:
        lease.release()
    assert tokens == [2]
    assert len(refused) == 7


def test_a_late_creator_of_an_old_number_does_not_win(run_dir: str) -> None:
    """It listed number 1, then 2 and 3 came and 2 was removed: 2 can be created, and must not count."""
    _leave(run_dir)
    _leave(run_dir)
    _leave(run_dir)
    files = LeaseFiles(f"{run_dir}/lease")
    assert files.create(2, owner="late") is None
    newest = files.newest()
    assert newest is not None and newest.token == 3
    assert files.create(4, owner="next") is not None


def test_a_file_left_empty_counts_from_its_time(tmp_path: Path) -> None:
    file = tmp_path / "lease" / "00000007.json"
    file.parent.mkdir()
    file.touch()
    long_ago = time.time() - 1000
    os.utime(file, (long_ago, long_ago))
    with _lease(str(tmp_path)) as lease:
        assert lease.token == 8
        assert json.loads((tmp_path / "lease" / "00000008.json").read_text())["pid"] == os.getpid()
    assert [path.name for path in file.parent.iterdir()] == ["00000008.json"]


def test_releasing_in_a_removed_directory_is_no_error(tmp_path: Path) -> None:
    with _lease(str(tmp_path / "run")):
        (tmp_path / "run" / "lease" / "00000001.json").unlink()
        (tmp_path / "run" / "lease").rmdir()


def test_a_later_start_of_a_job_takes_over_from_an_earlier_one_that_lives(run_dir: str) -> None:
    """Its tasks may outlive the slurmd that was to end them."""
    with _lease(run_dir, start=JobStart(job="slurm 42", restarts=1)) as earlier:
        for start in (None, JobStart(job="slurm 43", restarts=2), JobStart(job="slurm 42", restarts=1)):
            with pytest.raises(UserError, match="in use by pid"), _lease(run_dir, start=start):
                pass
        earlier.check()
        with _lease(run_dir, start=JobStart(job="slurm 42", restarts=2)) as later:
            with pytest.raises(LeaseLostError, match=r"was taken over by pid .*, a later start of this job"):
                earlier.check()
            later.check()


def test_an_earlier_start_of_a_job_that_comes_late_is_refused(run_dir: str) -> None:
    with _lease(run_dir, start=JobStart(job="slurm 42", restarts=2)):
        pass
    late = _lease(run_dir, start=JobStart(job="slurm 42", restarts=1))
    with pytest.raises(UserError, match="a later start of this very job"), late:
        pass
    with _lease(run_dir) as lease:  # by hand, outside of any job
        assert lease.token == 2
