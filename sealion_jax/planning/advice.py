"""What would make a step fit that does not: knobs of the recipe, and what each frees by the formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config, Remat
from sealion_jax.planning.analytical import abstract_mesh, estimate_analytically
from sealion_jax.planning.estimate import ACTIVATIONS, Estimate
from sealion_jax.planning.network import Place
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import on_mesh
from sealion_jax.sharding import BATCH_AXES

GIB = 2**30
MOST_FACTOR = 1024
LINES = 6
LOGITS_FACTOR = 8


def advise(
    config: TrainConfig,
    model: Gemma3Config,
    mesh_shape: Mapping[str, int],
    topology: Topology,
    places: Sequence[Place],
    estimate: Estimate,
) -> list[str]:
    """Lines that say what takes most, and which changes would free how much, the sufficient ones first.

    Args:
        config: the recipe as it is written: on each mesh it takes its own number of microbatches.
    """
    exceeded = estimate.needed - estimate.available
    devices = topology.chip.devices
    lines = [
        f"most is {estimate.largest_kind}: "
        f"{estimate.memory[estimate.largest_kind] * devices / GIB:.2f} GiB a chip; "
        f"{exceeded * devices / GIB:.2f} GiB have to go"
    ]
    before = estimate_analytically(_on_shape(config, mesh_shape), model, mesh_shape, topology, places)
    # Where formulas find less than the compiler needs, they find less to free, too.
    scale = estimate.memory[ACTIVATIONS] / before.memory[ACTIVATIONS]
    found: dict[str, tuple[float, str]] = {}
    for knob, changed, shape, text in _knobs(
        config, mesh_shape, topology.num_slices if topology.is_tpu else 1
    ):
        try:
            run = _on_shape(changed, shape)
            after = estimate_analytically(run, model, shape, topology, places)
        except UserError:
            continue  # some dimension does not divide
        frees = sum(
            (scale if kind == ACTIVATIONS else 1.0) * (size - after.memory[kind])
            for kind, size in before.memory.items()
        )
        # Of each knob the smallest change that is enough, or else the largest.
        if frees > 0 and (knob not in found or found[knob][0] < exceeded):
            found[knob] = (frees, text.format(microbatches=run.microbatches))
    enough = sorted((one for one in found.values() if one[0] >= exceeded), key=lambda one: one[0])
    rest = sorted((one for one in found.values() if one[0] < exceeded), key=lambda one: -one[0])
    for frees, text in [*enough, *rest][:LINES]:
        verdict = "enough" if frees >= exceeded else "not enough alone"
        lines.append(f"{text}: frees some {frees * devices / GIB:.2f} GiB a chip, {verdict}")
    if not enough:
        lines.append("a pod with more chips, or with more memory on each, or several of these together")
    return lines


def _on_shape(config: TrainConfig, shape: Mapping[str, int]) -> TrainConfig:
    """The recipe with the microbatches that a run takes on a mesh of this shape."""
    mesh: Any = abstract_mesh(shape)
    return on_mesh(config, mesh)


def _knobs(
    config: TrainConfig, mesh_shape: Mapping[str, int], slices: int
) -> Iterator[tuple[str, TrainConfig, Mapping[str, int], str]]:
    """(knob, changed recipe, changed mesh, in words), small changes before large ones.

    Words have a place for the microbatches that the changed recipe takes on the changed mesh.
    """
    now = _on_shape(config, mesh_shape).microbatches
    rows = config.global_batch_size // (math.prod(mesh_shape[axis] for axis in BATCH_AXES) * now)
    factors = [2**k for k in range(1, MOST_FACTOR.bit_length())]
    for factor in factors:
        if rows % factor == 0:
            yield (
                "microbatches",
                dataclasses.replace(config, microbatches=now * factor),
                mesh_shape,
                "--microbatches {microbatches} (less at a time, more gathers)",
            )
    if config.compute.keep:
        compute = dataclasses.replace(config.compute, keep=())
        yield (
            "keep",
            dataclasses.replace(config, compute=compute),
            mesh_shape,
            "--compute.keep (nothing by name)",
        )
    fewest = config.compute.logits_bytes_per_device // LOGITS_FACTOR
    yield (
        "logits",
        dataclasses.replace(
            config, compute=dataclasses.replace(config.compute, logits_bytes_per_device=fewest)
        ),
        mesh_shape,
        f"--compute.logits_bytes_per_device {fewest} (fewer logits at a time; they may be computed again)",
    )
    policies: tuple[Remat, ...] = ("layer", "block")
    for remat in policies:
        if remat != config.compute.remat:
            compute = dataclasses.replace(config.compute, remat=remat)
            yield (
                remat,
                dataclasses.replace(config, compute=compute),
                mesh_shape,
                f"--compute.remat {remat} ({_cost_of_remat(config.compute.remat, remat)})",
            )
    for factor in factors:
        if mesh_shape["data"] % (factor * slices) == 0:
            shape = {**mesh_shape, "data": mesh_shape["data"] // factor, "fsdp": mesh_shape["fsdp"] * factor}
            yield (
                "fsdp",
                config,
                shape,
                f"--mesh.data {shape['data']} --mesh.fsdp {shape['fsdp']} (fewer copies of the state)",
            )
    for axis in ("tensor", "context"):
        for factor in factors[:3]:
            if axis in mesh_shape and mesh_shape["fsdp"] % factor == 0:
                shape = {
                    **mesh_shape,
                    "fsdp": mesh_shape["fsdp"] // factor,
                    axis: mesh_shape[axis] * factor,
                }
                yield (
                    axis,
                    config,
                    shape,
                    f"--mesh.fsdp {shape['fsdp']} --mesh.{axis} {shape[axis]} "
                    "(each row over more devices; microbatches {microbatches})",
                )


def _cost_of_remat(before: Remat, after: Remat) -> str:
    """What another policy does. From block to layer, or back, no operation is added."""
    if before in ("layer", "block"):
        return "a layer at a time, more inputs kept" if after == "layer" else "fewer inputs kept"
    return "more is computed again"
