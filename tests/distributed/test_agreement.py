"""What is told of processes that do not agree, of clocks that differ, and of devices that are missing."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from types import SimpleNamespace

import jax
import pytest

from sealion_jax.distributed import devices as devices_module
from sealion_jax.distributed.agreement import Reading, clock_warnings, disagreements, missing_text
from sealion_jax.distributed.cluster import Cluster
from sealion_jax.distributed.code_version import code_versions, settings, sources_digest
from sealion_jax.distributed.devices import Devices, check_devices, describe_devices, limited, see_devices
from sealion_jax.distributed.words import Introduction, Verdict, encode, read_introduction, read_verdict
from sealion_jax.errors import UserError


def process(number: int, *, host: str | None = None, **facts: str) -> Introduction:
    return Introduction(process=number, processes=8, host=host or f"node{number}", pid=1, facts=facts)


def recipe(**fields) -> str:
    return json.dumps({"steps": 100, "data": {"seed": 1}, "name": "x"} | fields)


def test_processes_that_agree_are_told_nothing():
    assert disagreements([process(n, recipe=recipe(), jax="1") for n in range(4)]) == []


def test_the_one_with_another_recipe_is_named_with_the_fields():
    present = [process(n, recipe=recipe()) for n in range(3)]
    present.append(process(3, recipe=recipe(steps=200, data={"seed": 2})))
    told, remedy = disagreements(present)
    assert told == (
        "process 3 on node3 has another recipe than the others: steps: 200 there, 100 elsewhere; "
        "data.seed: 2 there, 1 elsewhere"
    )
    assert "same RECIPE" in remedy


def test_what_most_have_is_right_also_when_process_0_is_alone():
    present = [process(n, **{"version of jax": "0.11" if n else "0.10"}) for n in range(4)]
    told, remedy = disagreements(present)
    assert told == "process 0 on node0 has another version of jax than the others: 0.10 there, 0.11 elsewhere"
    assert "one environment" in remedy


def test_at_a_draw_and_in_groups_all_are_named():
    present = [process(n, host=f"node{n // 2}", code="a" if n < 2 else "b") for n in range(4)]
    assert disagreements(present)[0] == (
        "processes 2, 3 on node1 have another code than processes 0, 1 on node0: b there, a elsewhere"
    )
    many = disagreements([process(n, code=str(n)) for n in range(40)])
    assert len(many) == 10
    assert many[-2] == "and 31 more"


def test_clocks_of_machines_that_bear_the_same_name_are_told_by_process():
    present = [process(n, host="train") for n in range(5)]
    ahead = [0.0, 100.0, 0.1, -30.0, 90.0]
    readings = {n: Reading(ahead_seconds=ahead[n], within_seconds=0.1) for n in range(5)}
    early, late = clock_warnings(present, readings, limit_seconds=2.0)
    assert "the clock of processes 1, 4 on train is 89.9 s ahead of the others' clocks" in early
    assert "the clock of process 3 on train is 30.1 s behind the others' clocks" in late


def test_clocks_are_compared_by_host_and_with_what_is_not_known_of_them():
    present = [process(n, host=f"node{n // 2}") for n in range(6)]
    true = [0.0, 0.0, 0.5, 0.5, -7.0, -7.0]

    def warned(within: float) -> list[str]:
        readings = {n: Reading(ahead_seconds=true[n], within_seconds=within) for n in range(6)}
        return clock_warnings(present, readings, limit_seconds=2.0)

    (line,) = warned(0.1)
    assert "the clock of node2 is 7.0 s behind" in line
    assert warned(6.0) == []  # a slow network: they may be alike


def test_missing_processes_have_their_hosts_or_the_nodes_that_nobody_came_from():
    here = [process(0), process(1)]
    hosts = [f"node{n}" for n in range(4)]
    assert missing_text(here, processes=4, hosts=hosts, nodes=hosts) == "processes 2 (node2), 3 (node3)"
    told = missing_text(here, processes=3, hosts=(), nodes=["node0", "node1", "node9"])
    assert told == "process 2 (nobody came from node9)"
    assert missing_text(here, processes=200, hosts=(), nodes=()).endswith(" 33, 166 more")


def devices(number: int, count: int = 8, **more) -> Devices:
    return Devices(
        **{
            "process": number,
            "host": f"node{number}",
            "count": count,
            "kind": "NVIDIA H200",
            "platform": "gpu",
            **more,
        }
    )


def test_devices_that_are_alike_are_described():
    seen = [devices(0), devices(1)]
    check_devices(seen)
    assert describe_devices(seen) == "2 processes on 2 nodes, 8 gpu devices (NVIDIA H200) each"


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (
            devices(2, 1),
            "process 2 on node2 sees 1 gpu device (NVIDIA H200), the others 8 gpu devices (NVIDIA H200)",
        ),
        (
            devices(2, kind="NVIDIA H100"),
            "process 2 on node2 sees 8 gpu devices (NVIDIA H100), the others 8 gpu devices (NVIDIA H200)",
        ),
        (
            devices(2, 7, expected=8, expected_platform="gpu", expected_by="Slurm"),
            "process 2 on node2 sees 7 gpu devices (NVIDIA H200); expected 8 gpu by Slurm",
        ),
        (
            devices(
                2, 8, kind="cpu", platform="cpu", expected=8, expected_platform="gpu", expected_by="Slurm"
            ),
            "process 2 on node2 sees 8 cpu devices; expected 8 gpu by Slurm",
        ),
    ],
)
def test_devices_that_are_not_as_they_should_be_are_told_by_name(odd, told):
    with pytest.raises(UserError) as error:
        check_devices([devices(0), devices(1), odd])
    assert str(error.value).splitlines()[0] == told
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(("kind", "expected"), [("TPU7x", 8), ("TPU v5", 4)])
def test_chips_that_are_several_devices_are_counted_as_such(monkeypatch, kind, expected):
    cluster = Cluster(
        kind="cloud-tpu-vm",
        name="",
        coordinator_address="",
        num_processes=1,
        process_id=0,
        expected_devices=4,
        expected_platform="tpu",
    )
    seen = [SimpleNamespace(device_kind=kind, platform="tpu")] * 4
    monkeypatch.setattr(jax, "local_devices", lambda: seen)
    assert see_devices(cluster, host="a", expected=None).expected == expected
    assert see_devices(cluster, host="a", expected=3).expected == 3


def test_devices_that_hang_end_the_process_in_time(monkeypatch, capsys):
    codes, ended = [], threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(devices_module, "_LOOK_SECONDS", 0.01)
    with limited(0.05):
        assert ended.wait(10)
    assert codes[0] == 2
    assert "process 0 waited 0 s for its devices: the driver hangs" in capsys.readouterr().err
    ended.clear()
    with limited(0.3) as done:
        done.set()
        assert not ended.wait(0.6)


def test_versions_name_the_code_that_runs():
    versions = code_versions()
    assert versions["code of sealion_jax"] == f"sources {sources_digest('sealion_jax')}"
    assert {"version of jax", "version of jaxlib", "Python", "code of sealion_kernels"} <= set(versions)
    assert {f"version of {name}" for name in ("tensorstore", "sentencepiece", "ml_dtypes")} <= set(versions)


def test_settings_that_change_numbers_are_compared_and_those_of_a_place_are_not():
    of_a_place = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_dump_to=/tmp/a --xla_dump_hlo_as_text "
        "--xla_gpu_cuda_data_dir=/opt/cuda",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "/tmp/b",
        "JAX_COORDINATOR_ADDRESS": "a:1",
    }
    assert settings(of_a_place) == {}
    flags = of_a_place["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true --xla_allow_excess_precision"
    more = settings({"XLA_FLAGS": flags, "LIBTPU_INIT_ARGS": "--xla_tpu_x=1", "JAX_ENABLE_X64": "1"})
    assert more == {
        "JAX_ENABLE_X64": "1",
        "xla_cpu_enable_fast_math in XLA_FLAGS": "true",
        "xla_allow_excess_precision in XLA_FLAGS": "true",
        "xla_tpu_x in LIBTPU_INIT_ARGS": "1",
    }
    told, _ = disagreements([process(0), process(1), process(2, **settings({"JAX_ENABLE_X64": "1"}))])
    assert told == "process 2 on node2 has another JAX_ENABLE_X64 than the others: 1 there, none elsewhere"


def test_another_version_that_says_more_is_understood():
    plain = asdict(process(1, **{"code of sealion_jax": "other"})) | {"more": 1}
    assert read_introduction(encode(plain)) == process(1, **{"code of sealion_jax": "other"})
    assert read_verdict({"verdict": "go", "more": 1}) == Verdict(verdict="go")


@pytest.mark.parametrize("line", [b"", b"GET / HTTP/1.1\r\n", b"[1]\n", b"\xff\xfe\n", b'{"process": 1}\n'])
def test_who_does_not_speak_our_language_is_nobody(line):
    assert read_introduction(line) is None
