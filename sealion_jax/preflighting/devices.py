"""How fast a process's devices multiply, what memory they have, and how fast all devices add up together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_MIN_LOOPS = 4


@dataclass(frozen=True, kw_only=True)
class Products:
    """What the slowest of a process's devices did."""

    tflops: float
    """10^12 floating-point operations a second, of the slowest device."""
    slowest: int
    """Its number among the process's."""
    size: int
    """Matrices had so many rows and columns."""
    dtype: str


def measure_products(devices: Sequence[Any], *, seconds: float, size: int | None = None) -> Products:
    """The rate of square matrix products, on all these devices at once as in training.

    bfloat16 on accelerators, float32 on CPUs, whose bfloat16 no training uses.

    Args:
        seconds: about so long each device multiplies, after compiling.
        size: of the matrices; None: 8192, and 1024 on CPUs.
    """
    is_cpu = devices[0].platform == "cpu"
    size = size or (1024 if is_cpu else 8192)
    dtype = jnp.float32 if is_cpu else jnp.bfloat16
    # Orthogonal-like, so that repeated products neither grow nor vanish.
    matrix = (np.random.default_rng(0).normal(size=(size, size)) / np.sqrt(size)).astype(dtype)

    @jax.jit
    def multiply(left, right, loops):
        return jax.lax.fori_loop(0, loops, lambda _, x: (x @ right).astype(dtype), left)

    def rate(device: Any) -> float:
        right = jax.device_put(matrix, device)
        left = jax.block_until_ready(multiply(right, right, 1))
        loops, took = _MIN_LOOPS, 0.0
        while True:
            began = time.perf_counter()
            jax.block_until_ready(multiply(left, right, loops))
            took = time.perf_counter() - began
            if took > seconds / 2:
                return 2 * size**3 * loops / took / 1e12
            loops = min(int(loops * max(seconds / max(took, 1e-6), 2)), loops * 100)

    with ThreadPoolExecutor(len(devices)) as pool:
        rates = list(pool.map(rate, devices))
    slowest = int(np.argmin(rates))
    return Products(tflops=rates[slowest], slowest=slowest, size=size, dtype=np.dtype(dtype).name)


def measure_all_reduce(*, seconds: float, mebibytes: int | None = None) -> float | None:
    """GB/s at which all devices of all processes add up an array, or None with a single device.

    As NCCL's tests count it (bus bandwidth): bytes of the array x 2 (n - 1) / n, for each second. All
    processes call it together, and get the same.

    Args:
        mebibytes: of the array on each device; None: 256, and 16 on CPUs.
    """
    devices = jax.devices()
    if len(devices) == 1:
        return None
    size = (mebibytes or (16 if devices[0].platform == "cpu" else 256)) * 2**20 // 4
    mesh = Mesh(np.array(devices), ("all",))
    split, same = PartitionSpec("all"), PartitionSpec()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=split, out_specs=same)
    def add_up(part):
        return jax.lax.psum(part[0], "all")

    part = np.ones((1, size), np.float32)
    array = jax.make_array_from_callback(
        (len(devices), size), NamedSharding(mesh, split), lambda _index: part
    )
    jax.block_until_ready(add_up(array))

    def once(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(add_up(array))
        return time.perf_counter() - began

    # The number of turns must be the same for all, so process 0's clock counts.
    first = float(multihost_utils.broadcast_one_to_all(np.float32(once(2) / 2)))
    turns = int(np.clip(seconds / max(first, 1e-6), 3, 1000))
    took = float(multihost_utils.broadcast_one_to_all(np.float32(once(turns) / turns)))
    return size * 4 * 2 * (len(devices) - 1) / len(devices) / took / 1e9


def memory_gib(devices: Sequence[Any]) -> float | None:
    """GiB that a program may use on the smallest of the devices; None where JAX does not know (CPUs)."""
    stats = [device.memory_stats() or {} for device in devices]
    limits = [one["bytes_limit"] for one in stats if "bytes_limit" in one]
    return min(limits) / 2**30 if len(limits) == len(devices) else None
