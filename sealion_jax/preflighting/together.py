"""All processes measure at the same time, and every one gets what all have measured."""

from __future__ import annotations

import dataclasses
import json

import jax

from sealion_jax.checkpoint.processes import all_lines, on_first_process
from sealion_jax.config_tree import from_plain
from sealion_jax.errors import UserError
from sealion_jax.hardware import peak_flops_per_second
from sealion_jax.preflighting.devices import measure_all_reduce, measure_products, memory_gib
from sealion_jax.preflighting.limit import Limit
from sealion_jax.preflighting.report import Measured
from sealion_jax.preflighting.storage import measure_storage
from sealion_jax.storage import prepare_clients, require_writable

FOLDER = "preflight"


def measure(
    host: str, *, limit: Limit, run_dir: str | None, seconds: float, storage_mebibytes: int
) -> tuple[list[Measured], float | None]:
    """What every process measured, in their order, and the all-reduce's GB/s.

    Args:
        limit: is told what this process does.

    Raises:
        UserError: storage cannot be written, or a process could not write or read there; on all processes.
    """
    folder = None if run_dir is None else f"{run_dir.rstrip('/')}/{FOLDER}"
    if run_dir is not None:
        prepare_clients()
        with limit.doing("writing a first file", together=True):
            on_first_process(lambda: require_writable(run_dir))
    local = jax.local_devices()
    own = jax.process_index()
    _wait(limit)
    with limit.doing("matrix products"):
        products = measure_products(local, seconds=seconds)
    _wait(limit)
    with limit.doing("the all-reduce", together=True):
        all_reduce = measure_all_reduce(seconds=seconds)
    _wait(limit)
    peak = peak_flops_per_second(local[0].device_kind)
    measured = Measured(
        process=own,
        host=host,
        device_kind=local[0].device_kind,
        devices=len(local),
        memory_gib=memory_gib(local),
        tflops=products.tflops,
        slowest_device=products.slowest,
        dtype=products.dtype,
        peak_tflops=None if peak is None else peak / 1e12,
    )
    problem = ""
    if folder is not None:
        try:
            with limit.doing("writing and reading"):
                rates = measure_storage(folder, process=own, mebibytes=storage_mebibytes)
            measured = dataclasses.replace(measured, **dataclasses.asdict(rates))
        except Exception as error:  # whatever a store raises: the others wait for what this process says
            problem = f"process {own} on {host} could not write and read {folder}: {error}"
    problems = [line for line in _wait(limit, problem) if line]
    if problems:
        raise UserError("\n".join(problems))
    lines = _wait(limit, json.dumps(dataclasses.asdict(measured)))
    found = sorted((from_plain(json.loads(line), Measured) for line in lines), key=lambda one: one.process)
    return found, all_reduce


def _wait(limit: Limit, line: str = "") -> list[str]:
    """What all processes say; they go on at the same moment."""
    with limit.doing("waiting for each other", together=True):
        return all_lines([line])
