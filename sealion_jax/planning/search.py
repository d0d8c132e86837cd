"""Meshes, microbatches and remat policies tried, and those that fit ranked by how fast they can be."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, get_args

from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config, Remat
from sealion_jax.planning.analytical import abstract_mesh, analytical_state, estimate_analytically
from sealion_jax.planning.network import gpu_places, places_of
from sealion_jax.planning.planner import plan, tpu_mesh
from sealion_jax.planning.speed import speed_of
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig, batch_devices, mesh_shape

CANDIDATES = 8
"""Compiled by default: the formulas' best."""
TENSOR_SIZES = (1, 2, 4, 8)
MOST_MICROBATCHES = 64
HOPELESS = 1.5
"""Times the memory that there is; what the formulas find larger is not compiled."""
BYTES_A_PROCESS = 8e9
"""Of memory, that compiling a large model's step takes."""


def meshes(config: TrainConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Every way to lay the recipe's axes over the pod, `context` as the recipe has it."""
    devices = topology.num_devices
    context = mesh_shape(config.mesh, devices)["context"]
    for tensor in TENSOR_SIZES:
        for fsdp in range(1, devices + 1):
            if devices % (fsdp * tensor * context):
                continue
            data = devices // (fsdp * tensor * context)
            if not topology.is_tpu or data % topology.num_slices == 0:
                yield MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)


def candidates(config: TrainConfig, mesh: MeshConfig, topology: Topology) -> Iterator[TrainConfig]:
    """The recipe on a mesh with every remat policy and every number of microbatches that divides.

    Of a policy fewer microbatches come first.
    """
    shape: Any = abstract_mesh(mesh_shape(mesh, topology.num_devices))
    named = config.compute.keep or config.compute.offload
    for remat in get_args(Remat):
        if named and remat not in ("layer", "block"):
            continue
        compute = dataclasses.replace(config.compute, remat=remat)
        for batches in (2**k for k in range(MOST_MICROBATCHES.bit_length())):
            if config.global_batch_size % (batches * batch_devices(shape)):
                continue
            yield dataclasses.replace(
                config, mesh=mesh, microbatches=batches, rows_per_device=None, compute=compute
            )


def promising(
    config: TrainConfig, model: Gemma3Config, topology: Topology, *, most: int
) -> list[TrainConfig]:
    """Those candidates that the formulas find fastest, of those that may fit.

    More microbatches than are needed only cost time. So of each mesh and policy the fewest that fit by the
    formulas are taken, half as many and twice as many: formulas err.
    """
    ranked: list[tuple[tuple[Any, ...], TrainConfig]] = []
    for mesh in meshes(config, topology):
        shape = mesh_shape(mesh, topology.num_devices)
        on_mesh = dataclasses.replace(config, mesh=mesh)
        try:
            places = (
                places_of(tpu_mesh(on_mesh, topology).devices.ravel().tolist())
                if topology.is_tpu
                else gpu_places(topology)
            )
            state = analytical_state(on_mesh, model, abstract_mesh(shape))
        except UserError:
            continue  # the mesh cannot be laid over the torus, or some dimension does not divide
        fitting: dict[str, int] = {}
        for candidate in candidates(config, mesh, topology):
            remat = candidate.compute.remat
            estimate = estimate_analytically(candidate, model, shape, topology, places, state=state)
            if fitting.get(remat, 0) == 2 or estimate.needed > HOPELESS * estimate.available:
                continue
            fitting[remat] = fitting.get(remat, 0) + estimate.fits
            speed = speed_of(candidate, model, topology, estimate)
            assert speed is not None  # formulas give one to what does not fit, too
            order = (not estimate.fits, speed.step_overlapped, speed.step_in_turn, len(ranked))
            ranked.append((order, candidate))
    return [candidate for _, candidate in sorted(ranked, key=lambda one: one[0])[:most]]


def rank(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that fit first, the fastest first: by the step with everything overlapped, then with nothing."""

    def order(report: dict[str, Any]) -> tuple[Any, ...]:
        if not report["fits"]:
            return (1, report["memory"]["exceeded_by"], 0.0)
        return (0, report["speed"]["overlapped"]["step_seconds"], report["speed"]["in_turn"]["step_seconds"])

    return sorted(reports, key=order)


def search(
    config: TrainConfig,
    model: Gemma3Config,
    topology: Topology,
    *,
    command: Sequence[str],
    most: int,
    processes: int | None,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Reports on the most promising candidates, ranked.

    Args:
        command: the words of this search on the command line: recipe, topology and overrides. A process for
            each candidate is given them, with its own settings after.
        processes: that compile side by side; None takes what cores and memory allow.
    """
    chosen = promising(config, model, topology, most=most)
    if not chosen:
        raise UserError(
            f"no mesh, number of microbatches and remat policy of {config.name} comes near to fitting on "
            f"{topology.describe()}; take a larger pod"
        )
    tell(f"{len(chosen)} candidates, chosen by formulas")
    if not topology.is_tpu:
        return rank([plan(candidate, model, topology, tell=tell) for candidate in chosen])
    workers = processes or default_processes()
    reports = []
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_in_process, candidate, command): candidate for candidate in chosen}
        for done in as_completed(waiting):
            candidate = waiting[done]
            report = done.result()
            reports.append(report)
            tell(f"{len(reports)}/{len(chosen)}: {_describe(candidate, topology)}: {_verdict(report)}")
    return rank(reports)


def default_processes() -> int:
    """As many as there are cores, and memory for."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(free // BYTES_A_PROCESS)))


def settings(config: TrainConfig) -> list[str]:
    """What a search varies, as words of the command line."""
    mesh = {f"mesh.{axis.name}": getattr(config.mesh, axis.name) for axis in dataclasses.fields(config.mesh)}
    values = {
        **mesh,
        "microbatches": config.microbatches,
        "rows_per_device": config.rows_per_device,
        "compute.remat": config.compute.remat,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _in_process(config: TrainConfig, command: Sequence[str]) -> dict[str, Any]:
    """The report of a plan in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        words = [sys.executable, "-m", "sealion_jax.plan", *command, *settings(config)]
        done = subprocess.run([*words, "--output", str(output)], capture_output=True, text=True, check=False)
        if not output.is_file():
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(output.read_text())


def _describe(config: TrainConfig, topology: Topology) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in mesh_shape(config.mesh, topology.num_devices).items())
    return f"{mesh}, microbatches {config.microbatches}, remat {config.compute.remat}"


def _verdict(report: dict[str, Any]) -> str:
    memory = report["memory"]
    if not report["fits"]:
        return f"does not fit, by {memory['exceeded_by'] / 2**30:.1f} GiB a chip"
    speed = report["speed"]
    return (
        f"{memory['needed'] / 2**30:.1f} GiB a chip, MFU at most {speed['overlapped']['mfu']:.1%}, "
        f"{speed['in_turn']['mfu']:.1%} with nothing overlapped"
    )
