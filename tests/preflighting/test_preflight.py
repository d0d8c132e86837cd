"""Preflight: what is measured, which node is named, and what is left for the scheduler."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sealion_jax import preflight
from sealion_jax.cli import EXIT_USER_ERROR
from sealion_jax.errors import UserError
from sealion_jax.preflighting import together
from sealion_jax.preflighting.devices import measure_all_reduce, measure_products
from sealion_jax.preflighting.report import Measured, by_node, slow_nodes, table
from sealion_jax.preflighting.storage import measure_storage
from tests.commands import command_environment, commands_in_this_process, free_port, start, start_together


def measured(process: int, host: str, **more) -> Measured:
    given = {
        "device_kind": "NVIDIA H200",
        "devices": 4,
        "memory_gib": 131.0,
        "tflops": 700.0,
        "slowest_device": 0,
        "dtype": "bfloat16",
        "peak_tflops": 989.0,
        "write_mb_per_s": 900.0,
        "read_mb_per_s": 2000.0,
        "small_write_ms": 2.0,
        **more,
    }
    return Measured(process=process, host=host, **given)


def test_a_node_is_as_slow_as_its_slowest_process():
    (node, other) = by_node(
        [
            measured(0, "a"),
            measured(1, "a", tflops=350.0, slowest_device=2, small_write_ms=9.0),
            measured(2, "b"),
        ]
    )
    assert (node.devices, node.tflops, node.slowest_device) == (8, 350.0, "process 1's device 2")
    assert node.small_write_ms == 9.0
    assert node.peak_share == pytest.approx(350 / 989)
    assert other.name == "b"


def test_nodes_below_a_part_of_the_median_are_named_with_what_they_are_slow_in():
    nodes = by_node(
        [
            measured(0, "a"),
            measured(1, "b", tflops=500.0),
            measured(2, "c", read_mb_per_s=1100.0),
            measured(3, "d", write_mb_per_s=100.0),
        ]
    )
    slow = slow_nodes(nodes, below=0.8, storage_below=0.5, least_of_peak=0.4)
    assert set(slow) == {"b", "d"}
    assert slow["b"] == ["matrix products: 500 TFLOP/s, process 1's device 0; the median of all nodes is 700"]
    assert slow["d"] == ["writing: 100 MB/s; the median of all nodes is 900"]
    assert slow_nodes(nodes, below=0.7, storage_below=0.1, least_of_peak=0.4) == {}
    lines = table(nodes, list(slow), 380.0)
    assert [line.split()[0] for line in lines] == ["node", "a", "b", "c", "d", "all-reduce"]
    assert [line.endswith("slow") for line in lines[1:5]] == [False, True, False, True]
    assert "71%" in lines[1]
    assert "131.0 GiB" in lines[1]


def test_of_two_nodes_the_slower_one_is_found_and_one_alone_is_never_slow():
    pair = by_node([measured(0, "a"), measured(1, "b", tflops=400.0)])
    assert list(slow_nodes(pair, below=0.8, storage_below=0.5, least_of_peak=0.4)) == ["b"]
    assert slow_nodes(pair[1:], below=0.8, storage_below=0.5, least_of_peak=0.4) == {}


def test_nodes_that_are_all_alike_slow_are_found_by_the_chips_own_figure():
    nodes = by_node([measured(n, name, tflops=200.0) for n, name in enumerate("abc")])
    slow = slow_nodes(nodes, below=0.8, storage_below=0.5, least_of_peak=0.4)
    assert list(slow) == ["a", "b", "c"]
    assert slow["b"] == [
        "matrix products: 20% of the chip's peak, process 1's device 0; at least 40% is expected"
    ]
    assert slow_nodes(nodes, below=0.8, storage_below=0.5, least_of_peak=0.2) == {}
    assert slow_nodes(nodes, below=0.8, storage_below=0.5, least_of_peak=0) == {}


def test_a_node_with_less_memory_than_most_is_named():
    nodes = by_node([measured(0, "a"), measured(1, "b", memory_gib=71.0), measured(2, "c")])
    assert slow_nodes(nodes, below=0.8, storage_below=0.5, least_of_peak=0.4) == {
        "b": ["memory: 71 GiB; the median of all nodes is 131"]
    }


def test_what_is_not_known_is_shown_as_such():
    (node,) = by_node([measured(0, "a", memory_gib=None, peak_tflops=None, write_mb_per_s=None)])
    assert slow_nodes([node], below=0.8, storage_below=0.5, least_of_peak=0.4) == {}
    assert "  -       700 TFLOP/s bfloat16  -        -      2000 MB/s" in table([node], [], None)[1]


def test_rates_of_devices_are_those_of_the_work_done():
    """The same work counted in another way: timed products of NumPy's kind cannot be faster by far."""
    products = measure_products(jax.local_devices()[:2], seconds=0.05, size=128)
    assert (products.size, products.dtype) == (128, "float32")
    assert 1e-6 < products.tflops < 10
    rate = measure_all_reduce(seconds=0.02, mebibytes=1)
    assert rate is not None
    assert 0 < rate < 1000


def test_storage_is_left_as_it_was(tmp_path):
    rates = measure_storage(str(tmp_path / "run" / "preflight"), process=3, mebibytes=8)
    assert min(rates.write_mb_per_s, rates.read_mb_per_s, rates.small_write_ms) > 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


@pytest.fixture
def in_this_process():
    with commands_in_this_process():
        yield


@pytest.mark.parametrize("option", ["--output", "--exclude-file"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path, monkeypatch, in_this_process, option
):
    measuring = []
    monkeypatch.setattr(together, "measure", lambda *_, **__: measuring.append(1))
    nowhere = tmp_path / "nonexistent" / "x"
    with pytest.raises(UserError, match=f"{option} {nowhere} cannot be written: No such file"):
        preflight.main(["--cluster", "none", option, str(nowhere)])
    assert not measuring


def test_slow_nodes_are_written_down_first_and_those_of_before_are_not_left(
    tmp_path, monkeypatch, in_this_process
):
    exclude, output = tmp_path / "exclude", tmp_path / "output"
    exclude.write_text("old\n")
    seen = []

    def measure(host, **_):
        seen.append((exclude.read_text(), output.exists()))
        output.mkdir()  # it could be written when it was tried
        return [measured(0, "a", tflops=100.0)], None

    monkeypatch.setattr(together, "measure", measure)
    with pytest.raises(IsADirectoryError):
        preflight.main(["--cluster", "none", "--exclude-file", str(exclude), "--output", str(output)])
    assert seen == [("", False)]
    assert exclude.read_text() == "a\n"


def test_a_node_that_is_refused_while_joining_is_left_for_the_scheduler(tmp_path, in_this_process):
    exclude = tmp_path / "exclude"
    words = ["--cluster", "none", "--expect-local-devices", "99", "--exclude-file", str(exclude)]
    with pytest.raises(UserError, match="expected 99 by --expect-local-devices"):
        preflight.main(words)
    assert exclude.read_text() == f"{socket.gethostname()}\n"


def test_all_that_is_measured_has_to_be_measured_alike_by_all():
    alike = preflight.PreflightOptions(process_id=0, num_processes=2, coordinator_address="a:1", output="x")
    other = preflight.PreflightOptions(process_id=1, num_processes=2, coordinator_address="a:1")
    facts = preflight._measured_with(alike)
    assert facts == preflight._measured_with(other)
    assert facts["--seconds"] == "3.0"
    assert {"--run-dir", "--storage-mebibytes", "--slow-below", "--least-of-peak"} <= set(facts)


PINNED = "import os, sys, runpy; os.sched_setaffinity(0, {int(sys.argv.pop(1))}); "
# Takes a core's time from whoever runs on it.
BUSY = PINNED + "exec('while True: pass')"
PREFLIGHT = PINNED + "runpy.run_module('sealion_jax.preflight', run_name='__main__', alter_sys=True)"


def pinned(code: str, core: int, *words: object, **more) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(core), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


@pytest.mark.slow
def test_a_slow_node_is_named_and_left_for_the_scheduler_to_exclude(tmp_path):
    """Two nodes of one core each; once they have joined twelve other programs run on the second one's."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    address = f"127.0.0.1:{free_port()}"
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "fast,slow",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    output, exclude = tmp_path / "preflight.json", tmp_path / "exclude"
    words = ["--coordinator-address", address, "--run-dir", tmp_path / "run", "--seconds", 1]
    words += ["--storage-mebibytes", 16, "--output", output, "--exclude-file", exclude]
    words += ["--slow-below", 0.6, "--slow-storage-below", 0.0]
    busy, processes = [], []
    try:
        for number, name in enumerate(("fast", "slow")):
            own = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURMD_NODENAME": name}
            environment = command_environment() | slurm | own
            processes.append(pinned(PREFLIGHT, cores[number], *words, env=environment))
        joined = next(line for line in processes[0].stdout if "2 processes on 2 nodes" in line)
        busy = [pinned(BUSY, cores[1]) for _ in range(12)]
        assert joined.startswith("slurm job 7: ")
        told = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in [*busy, *processes]:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [preflight.EXIT_SLOW] * 2, told
    assert "slow is slow. matrix products:" in told[0]
    assert "all-reduce over all devices" in told[0]
    assert "is slow" not in told[1]
    assert exclude.read_text() == "slow\n"
    found = json.loads(output.read_text())
    assert found["slow"] == ["slow"]
    assert [node["name"] for node in found["nodes"]] == ["fast", "slow"]
    assert found["all_reduce_gb_per_s"] > 0
    assert not (tmp_path / "run" / "preflight").exists()


@pytest.mark.slow
def test_a_process_that_is_stopped_while_it_measures_is_named_with_its_node(tmp_path):
    exclude = tmp_path / "exclude"
    words = ["--seconds", 60, "--heartbeat-timeout-seconds", 12, "--exclude-file", exclude]
    processes = start_together("preflight", *words, processes=2, environment=command_environment())
    try:
        assert processes[0].stdout is not None
        assert any("2 processes on 1 node" in line for line in processes[0].stdout)
        processes[1].send_signal(signal.SIGSTOP)
        told = processes[0].communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == preflight.EXIT_SLOW, told
    host = socket.gethostname()
    assert f"error: no sign of life for 6 s from process 1 on {host}" in told
    assert exclude.read_text() == f"{host}\n"


@pytest.mark.slow
def test_one_node_by_the_command_and_one_that_cannot_be_written(tmp_path):
    words = ["--seconds", 0.2, "--storage-mebibytes", 8]
    good = start(
        *("preflight", "--run-dir", tmp_path / "run", *words), environment=command_environment(devices=2)
    )
    bad = start(*("preflight", "--run-dir", "/proc/no/such/place", *words), environment=command_environment())
    output, error = (process.communicate(timeout=120)[0] for process in (good, bad))
    assert good.returncode == 0, output
    assert "2 x cpu" in output
    assert bad.returncode == EXIT_USER_ERROR, error
    assert "/proc/no/such/place" in error
    assert "Traceback" not in error
    assert Path("/proc/no").exists() is False
