"""Preflight: what is measured, which node is named, and what is left for the scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sealion_jax import preflight
from sealion_jax.cli import EXIT_USER_ERROR
from sealion_jax.preflighting.devices import measure_all_reduce, measure_products
from sealion_jax.preflighting.report import Measured, by_node, slow_nodes, table
from sealion_jax.preflighting.storage import measure_storage
from tests.commands import command_environment, free_port, start


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
    slow = slow_nodes(nodes, below=0.8, storage_below=0.5)
    assert set(slow) == {"b", "d"}
    assert slow["b"] == ["matrix products: 500 TFLOP/s, process 1's device 0; the median of all nodes is 700"]
    assert slow["d"] == ["writing: 100 MB/s; the median of all nodes is 900"]
    assert slow_nodes(nodes, below=0.7, storage_below=0.1) == {}
    lines = table(nodes, list(slow), 380.0)
    assert [line.split()[0] for line in lines] == ["node", "a", "b", "c", "d", "all-reduce"]
    assert [line.endswith("slow") for line in lines[1:5]] == [False, True, False, True]
    assert "71%" in lines[1]
    assert "131.0 GiB" in lines[1]


def test_of_two_nodes_the_slower_one_is_found_and_one_alone_is_never_slow():
    pair = by_node([measured(0, "a"), measured(1, "b", tflops=400.0)])
    assert list(slow_nodes(pair, below=0.8, storage_below=0.5)) == ["b"]
    assert slow_nodes(pair[1:], below=0.8, storage_below=0.5) == {}


def test_what_is_not_known_is_shown_as_such():
    (node,) = by_node([measured(0, "a", memory_gib=None, peak_tflops=None, write_mb_per_s=None)])
    assert slow_nodes([node], below=0.8, storage_below=0.5) == {}
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
