"""Compiler flags: in the environment before JAX starts, the user's own first, and known to the compilers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
from jaxlib import xla_client

from sealion_jax import compiler, distributed, train
from sealion_jax.compiler import FLAG_SETS, CompilerConfig, set_flags, set_gpu_memory
from sealion_jax.errors import UserError
from sealion_jax.hardware import GPU_MEMORY_FRACTION

ALL = CompilerConfig(flag_sets=tuple(FLAG_SETS))


def test_an_unknown_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean scoped_vmem"):
        CompilerConfig(flag_sets=("scoped_vem",))


def test_flags_are_added_where_there_is_such_a_device_and_the_users_own_stay(monkeypatch) -> None:
    for installed in ((), ("libtpu",), ("jax_cuda13_plugin",)):
        monkeypatch.setattr(compiler, "find_spec", lambda name, there=installed: name in there or None)
        environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"}
        before = dict(environment)
        added = set_flags(CompilerConfig(flag_sets=("latency_hiding", "deterministic")), environment)
        if not installed:
            assert added == [] and environment == before
        elif installed == ("libtpu",):
            assert environment == {
                **before,
                "LIBTPU_INIT_ARGS": "--xla_tpu_enable_latency_hiding_scheduler=true",
            }
        else:
            assert added == ["--xla_gpu_exclude_nondeterministic_ops=true"]
            assert environment["XLA_FLAGS"] == f"{added[0]} {before['XLA_FLAGS']}"


def test_a_gpus_memory_is_set_where_there_is_one_and_the_users_own_stays(monkeypatch) -> None:
    for installed in ((), ("libtpu",), ("jax_cuda12_plugin",)):
        monkeypatch.setattr(compiler, "find_spec", lambda name, there=installed: name in there or None)
        environment: dict[str, str] = {}
        set_gpu_memory(0.9, environment)
        there = installed == ("jax_cuda12_plugin",)
        assert environment == ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"} if there else {})
        for own in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):  # JAX refuses both
            environment = {own: "0.5"}
            set_gpu_memory(0.9, environment)
            assert environment == {own: "0.5"}


def test_jax_reads_the_variable_of_a_gpus_memory(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda name: True)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    set_gpu_memory(GPU_MEMORY_FRACTION, os.environ)
    options: Any = xla_client.generate_pjrt_gpu_plugin_options()
    assert options["memory_fraction"] == GPU_MEMORY_FRACTION


def test_train_sets_it_before_jax_starts(monkeypatch) -> None:
    """And before the processes join, which asks JAX for devices."""
    monkeypatch.setattr(compiler, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
    seen = {}

    def join(config, environment, **options):
        seen.update(environment)
        raise UserError("far enough")

    monkeypatch.setattr(distributed, "join", join)
    with pytest.raises(UserError, match="far enough"):
        train.main(["cpt_tiny"])
    assert seen["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


def run_with(variable: str, flags: list[str], program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", variable: " ".join(flags)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def flags(platform: str) -> list[str]:
    return [f"--{k}={v}" for some in FLAG_SETS.values() for k, v in getattr(some, platform).items()]


def test_the_compiler_knows_every_gpu_flag() -> None:
    """XLA ends a process that has a flag it does not know; it knows those for GPUs without one."""
    program = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = run_with("XLA_FLAGS", flags("gpu"), program)
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr[-2000:]
    assert run_with("XLA_FLAGS", ["--xla_gpu_no_such_flag=true"], program).returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_the_compiler_knows_every_tpu_flag() -> None:
    program = """
from sealion_jax.planning.environment import prepare_environment
prepare_environment()
import jax
from jax.experimental.topologies import get_topology_desc
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
device = get_topology_desc("v5e:2x2", platform="tpu").devices[0]
x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile()
print("compiled")
"""
    done = run_with("LIBTPU_INIT_ARGS", flags("tpu"), program)
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stderr[-2000:]
    assert run_with("LIBTPU_INIT_ARGS", ["--xla_tpu_no_such_flag=true"], program).returncode != 0
