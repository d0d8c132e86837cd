"""Real processes join on this machine's CPUs, or say why they cannot: same words for all, code 2, in time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import sealion_jax
from sealion_jax.distributed import Devices, DistributedConfig, devices, joining
from sealion_jax.distributed.words import Verdict
from sealion_jax.errors import UserError
from tests.commands import command_environment, free_port, start
from tests.tiny_run import make_world

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 6


@pytest.fixture
def joiners():
    """Starts joiners; whatever they do, they are gone in the end."""
    started: list[subprocess.Popen[str]] = []

    def joiner(process: int, processes: int = 2, *, port: int, environ=None, path=ROOT, config=None, **given):
        flags = {"coordinator_address": f"127.0.0.1:{port}", "join_timeout_seconds": LIMIT_SECONDS}
        if environ is None or "SLURM_JOB_ID" not in environ:
            flags |= {"num_processes": processes, "process_id": process}
        words = json.dumps({"config": flags | (config or {}), **given})
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.joiner", words],
                env=command_environment() | {"PYTHONPATH": f"{path}:{ROOT}"} | (environ or {}),
                cwd=path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield joiner
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def port() -> int:
    return free_port()


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each, without what all print when they begin."""
    outputs = [process.communicate(timeout=60)[0].removeprefix("started\n") for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def refused_alike(processes: list[subprocess.Popen[str]]) -> str:
    """What all are told, who all end with exit code 2 and no traceback."""
    found = ends(processes)
    assert [code for code, _ in found] == [2] * len(found), found
    assert len({output for _, output in found}) == 1, found
    assert found[0][1].startswith("error: ")
    assert len(found[0][1].splitlines()) <= 3, found
    return found[0][1]


def until_joined(process: subprocess.Popen[str]) -> None:
    """Waits until it says so; fails if it ends before."""
    assert process.stdout is not None
    assert any(line.startswith("joined") for line in iter(process.stdout.readline, ""))


def slurm(process: int, *, processes: int = 2, **more: str) -> dict[str, str]:
    """The environment of a task on a node of its own."""
    return {
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": f"node[0-{processes - 1}]",
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{processes})",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(process),
        "SLURMD_NODENAME": f"node{process}",
        **more,
    }


def test_two_join_also_behind_a_proxy_for_web_pages(joiners, port):
    nowhere = {"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
    first, second = ends([joiners(n, port=port, environ=nowhere) for n in range(2)])
    told = f"flags: 2 processes on 1 node, 1 cpu device each, coordinator 127.0.0.1:{port}\n"
    assert first == (0, f"{told}joined 2 True\nstayed 2\n")
    assert second == (0, "joined 2 True\nstayed 2\n")


def test_one_alone_starts_nothing(joiners, port):
    assert ends([joiners(0, 1, port=port)]) == [(0, "joined 0 False\nstayed 1\n")]


def test_devices_have_a_limit_of_their_own(monkeypatch):
    """On GKE processes are waited for a day: nodes come back at different times."""
    limits = []
    monkeypatch.setattr(joining, "meet", lambda *_: Verdict(verdict="go"))
    monkeypatch.setattr(joining, "_connect", lambda *_: None)
    monkeypatch.setattr(joining, "check_devices", lambda _: None)

    def exchange(*_, limit_seconds, **__):
        limits.append(limit_seconds)
        return []

    monkeypatch.setattr(joining, "exchange_devices", exchange)
    flags = {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 1}
    for patience in (1, 86400):
        joining.join(DistributedConfig(**flags, join_timeout_seconds=patience))
    assert limits == [600, 600]


@pytest.mark.parametrize(("process", "blamed"), [(0, [["b"]]), (1, [])])
def test_process_0_is_given_the_hosts_whose_devices_are_refused(monkeypatch, process, blamed):
    def seen(number: int, host: str, count: int) -> Devices:
        return Devices(process=number, host=host, count=count, kind="NVIDIA H200", platform="gpu")

    found: list[Sequence[str]] = []
    monkeypatch.setattr(joining, "meet", lambda *_: Verdict(verdict="go"))
    monkeypatch.setattr(joining, "_connect", lambda *_: None)
    all_seen = [seen(0, "a", 8), seen(1, "b", 7), seen(2, "c", 8)]
    monkeypatch.setattr(joining, "exchange_devices", lambda *_, **__: all_seen)
    flags = {"coordinator_address": "127.0.0.1:1", "num_processes": 3, "process_id": process}
    with pytest.raises(UserError, match="process 1 on b sees 7 gpu devices"):
        joining.join(DistributedConfig(**flags), blame=found.append)
    assert found == blamed


@pytest.mark.parametrize(("process", "blamed"), [(0, ["b"]), (1, [])])
def test_process_0_is_given_the_host_that_wakes_no_device(monkeypatch, process, blamed, capsys):
    """The other is deep within JAX then; a thread ends it."""
    found, ended = [], threading.Event()
    told = json.dumps(["process 2 found no device", "b"])
    client = SimpleNamespace(key_value_try_get=lambda _: told)
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(devices, "_LOOK_SECONDS", 0.05)
    with devices.limited(60, client, process, blame=found.extend):
        assert ended.wait(10)
    assert found[:1] == blamed
    assert "error: process 2 found no device\n" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_of_slurm_join_and_clocks_that_differ_are_a_warning(joiners, port):
    found = ends([joiners(n, port=port, environ=slurm(n), ahead=5 * n) for n in range(2)])
    assert [code for code, _ in found] == [0, 0], found
    warning, line, *_ = found[0][1].splitlines()
    assert warning.startswith("warning: the clock of node1 is 5.0 s ahead of the others' clocks")
    assert line == f"slurm job 42: 2 processes on 2 nodes, 1 cpu device each, coordinator 127.0.0.1:{port}"


@pytest.mark.slow
def test_a_missing_task_is_named_with_its_node(joiners, port):
    started = time.monotonic()
    told = refused_alike([joiners(n, port=port, environ=slurm(n, processes=3)) for n in (0, 2)])
    assert f"process 1 (node1) did not come within {LIMIT_SECONDS} s; there were 0 (node0), 2 (node2)" in told
    assert time.monotonic() - started < LIMIT_SECONDS + 10


@pytest.mark.slow
def test_a_process_too_many_is_refused(joiners, port):
    first = joiners(0, port=port)
    assert first.stdout is not None
    first.stdout.readline()  # the other does not wait long for it
    told = refused_alike([first, joiners(2, port=port)])
    assert "process 2 on" in told
    assert "there are 2 processes, numbered from 0" in told


@pytest.mark.slow
def test_one_too_many_does_not_harm_a_run_that_has_begun(joiners, port):
    """A second process 1, and a second process 0, knock at a run that is complete."""
    run = [joiners(n, port=port, stay=120) for n in range(2)]
    for process in run:
        until_joined(process)
    late = ends([joiners(n, port=port, config={"join_timeout_seconds": 1}) for n in range(2)])
    assert [code for code, _ in late] == [2, 2], late
    assert "in use by another program" in late[0][1]
    assert "something else listens there" in late[1][1]
    time.sleep(1)
    assert [process.poll() for process in run] == [None, None]


@pytest.mark.slow
def test_other_code_is_refused(joiners, port, tmp_path):
    """Process 1 runs a copy of the package in which one comment is another, and one setting of JAX."""
    copy = tmp_path / "sealion_jax"
    shutil.copytree(Path(sealion_jax.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "metrics.py").open("a") as file:
        file.write("# another comment\n")
    other = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    told = refused_alike([joiners(0, port=port), joiners(1, port=port, path=tmp_path, environ=other)])
    assert "process 1 on" in told
    assert "has another code of sealion_jax than process 0 on" in told
    assert "sources " in told
    assert "has another JAX_DEFAULT_MATMUL_PRECISION than process 0 on" in told
    assert "highest there, none elsewhere" in told


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_devices_that_cannot_be_woken_end_all(joiners, port, broken):
    """The other one is deep within JAX by then, waiting for its devices to be told."""
    started = time.monotonic()
    environs = [{"JAX_PLATFORMS": "cuda"} if n == broken else {} for n in range(2)]
    told = refused_alike([joiners(n, port=port, environ=environs[n]) for n in range(2)])
    assert f"process {broken} found no device that it can use" in told
    assert time.monotonic() - started < 25


@pytest.mark.slow
def test_devices_that_are_fewer_are_named(joiners, port):
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    told = refused_alike([joiners(n, 3, port=port, environ=two if n != 1 else {}) for n in range(3)])
    assert told.startswith("error: process 1 on ")
    assert "sees 1 cpu device, the others 2 cpu devices" in told


@pytest.mark.slow
def test_gpus_that_slurm_gave_and_jax_does_not_see_are_told(joiners, port):
    """On a machine without GPUs: of several processes, and of one alone."""
    gpus = {"SLURM_GPUS_ON_NODE": "8", "JAX_PLATFORMS": ""}
    told = refused_alike([joiners(n, port=port, environ=slurm(n, **gpus)) for n in range(2)])
    assert "process 0 on node0 sees 1 cpu device; expected 8 gpu by Slurm (SLURM_GPUS_ON_NODE)" in told
    assert "process 1 on node1 sees 1 cpu device; expected 8 gpu by Slurm (SLURM_GPUS_ON_NODE)" in told
    alone = refused_alike([joiners(0, port=port, environ=slurm(0, processes=1, **gpus))])
    assert "process 0 on node0 sees 1 cpu device; expected 8 gpu" in alone


@pytest.mark.slow
def test_asked_to_stop_while_they_wait_for_a_third_all_say_run_me_again(joiners, port):
    waiting = [joiners(n, 3, port=port, config={"join_timeout_seconds": 60}) for n in range(2)]
    for process in waiting:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(1)
    waiting[1].send_signal(signal.SIGTERM)
    found = ends(waiting)
    assert [code for code, _ in found] == [75, 75], found
    assert "process 1 on" in found[0][1]
    assert "run me again" in found[0][1]


@pytest.mark.slow
def test_a_dead_process_takes_the_others_down(joiners, port):
    """JAX ends them when no heartbeat came for the time that was set."""
    config = {"heartbeat_timeout_seconds": 5}
    run = [joiners(n, 3, port=port, stay=120, config=config) for n in range(3)]
    for process in run:
        until_joined(process)
    run[2].kill()
    started = time.monotonic()
    assert all(code != 0 for code, _ in ends(run[:2]))
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_two_processes_of_another_recipe_are_refused_by_the_command(tmp_path, port):
    world = make_world(tmp_path)
    flags = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", 2, "--join-timeout-seconds", 30]
    run_dir = tmp_path / "run"
    processes = [
        start(
            *("train", world.recipe, "--run-dir", run_dir, "--steps", 12 + n, *flags, "--process-id", n),
            environment=command_environment(),
        )
        for n in range(2)
    ]
    told = refused_alike(processes)
    assert "process 1 on " in told
    assert "steps: 13 there, 12 elsewhere" in told
    assert not run_dir.exists()
