"""A plan as JSON, and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sealion_jax.compiler import GPU_MEMORY_VARIABLE
from sealion_jax.hardware import GPU_MEMORY_FRACTION
from sealion_jax.model.config import Gemma3Config
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.planning.estimate import Estimate
from sealion_jax.planning.network import Traffic
from sealion_jax.planning.speed import Speed, speed_of
from sealion_jax.planning.step import TOKENS_A_PAIR_PLACE, default_pair_places
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig

GIB = 2**30
SECONDS_A_DAY = 86_400

NOT_KNOWN = (
    "how much of memory and network the matmuls hide: the two ends are given, all of it and nothing",
    "how close matmuls and links come to their peaks, and the latency of small collectives",
    "reading data on the hosts, saving checkpoints, evaluations, failures",
    "other traffic on the network between slices or nodes",
)
OFFLOAD_NOT_KNOWN = "how long what is offloaded takes to the host's memory and back: it is in no time here"


def make_report(
    config: TrainConfig,
    model: Gemma3Config,
    topology: Topology,
    mesh_shape: Mapping[str, int],
    estimate: Estimate,
    *,
    analytical: Estimate | None = None,
    advice: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that a plan says, as JSON has it: bytes and rates of a chip, seconds of a step.

    Args:
        analytical: the same step by formulas, to stand beside.
        advice: what would make it fit.
    """
    speed = speed_of(config, model, topology, estimate)
    report: dict[str, Any] = {
        "recipe": config.name,
        "topology": topology.describe(),
        "method": estimate.method,
        "fits": estimate.fits,
        "assumptions": assumptions(config, topology),
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "mesh": dict(mesh_shape),
        "microbatches": config.microbatches,
        "remat": config.compute.remat,
        "keep": list(config.compute.keep),
        "offload": list(config.compute.offload),
        "quantization": config.compute.quantization,
        "compiler_flag_sets": list(config.compiler.flag_sets),
        "global_batch_size": config.global_batch_size,
        "sequence_length_tokens": config.sequence_length_tokens,
        "parameters": dict(estimate.split),
        "memory": _memory(estimate, topology),
        "collectives": None
        if estimate.traffic is None
        else [_collective(row, topology) for row in estimate.traffic],
        "speed": None if speed is None else _speed(speed, config, topology),
        "advice": list(advice),
        "not_known": [*NOT_KNOWN, *([OFFLOAD_NOT_KNOWN] if config.compute.offload else [])],
        "compile_seconds": estimate.compile_seconds,
        "versions": {name: _version(name) for name in ("jax", "libtpu", "sealion_jax")},
    }
    if analytical is not None:
        by_formula = speed_of(config, model, topology, analytical)
        report["analytical"] = {
            "memory": _memory(analytical, topology),
            "speed": None if by_formula is None else _speed(by_formula, config, topology),
        }
    return report


def assumptions(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    """What is taken for given about the chips, and about batches that nobody has seen."""
    chip = topology.chip
    given: dict[str, Any] = {
        "chip": chip.name,
        "bf16_tflops": chip.bf16_tflops,
        "int8_tops": chip.int8_tops,
        "fp8_tflops": chip.fp8_tflops,
        "hbm_gib": chip.hbm_gib,
        "hbm_gb_per_s": chip.hbm_gb_per_s,
        "link_gb_per_s": chip.link_gb_per_s,
        "network_gb_per_s": chip.network_gb_per_s,
        "network_taken_from": chip.network_taken_from,
        "devices_a_chip": chip.devices,
    }
    if topology.is_tpu:
        links = {
            f"direction_{axis}": {
                "chips": size,
                "ring": ring,
                "gb_per_s": chip.link_gb_per_s * (1 + ring) * (size > 1),
            }
            for axis, (size, ring) in enumerate(zip(topology.shape, topology.rings, strict=True))
        }
        given["links"] = links
        given["links_gb_per_s"] = 2 * chip.torus_axes * chip.link_gb_per_s
    else:
        given["memory_fraction"] = GPU_MEMORY_FRACTION
        given["memory_variable"] = GPU_MEMORY_VARIABLE
    if isinstance(config.objective, PreferenceConfig):
        given["pair_places_a_row"] = default_pair_places(config)
        given["tokens_a_pair_place"] = TOKENS_A_PAIR_PLACE
    return given


def _memory(estimate: Estimate, topology: Topology) -> dict[str, Any]:
    devices = topology.chip.devices
    needed, available = estimate.needed * devices, estimate.available * devices
    return {
        "unit": "bytes a chip",
        "kinds": {kind: size * devices for kind, size in estimate.memory.items()},
        "needed": needed,
        "available": available,
        "exceeded_by": max(needed - available, 0.0),
        "at_least": estimate.at_least,
        "largest_allocations": list(estimate.largest),
    }


def _collective(row: Traffic, topology: Topology) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "axes": list(row.axes),
        "group_size": row.group_size,
        "executions": row.count,
        "received_bytes": row.received_bytes * topology.chip.devices,
        "seconds_on_links": row.seconds.links,
        "seconds_on_network": row.seconds.network,
        "written_as": list(row.written_as),
        "at_least": row.at_least,
    }


def _speed(speed: Speed, config: TrainConfig, topology: Topology) -> dict[str, Any]:
    tokens = speed.tokens_per_step * config.steps

    def ends(step_seconds: float) -> dict[str, float]:
        days = config.steps * step_seconds / SECONDS_A_DAY
        return {
            "step_seconds": step_seconds,
            "mfu": speed.mfu(step_seconds),
            "tokens_per_second": speed.tokens_per_second(step_seconds),
            "days": days,
            "chip_hours": days * 24 * topology.num_chips,
        }

    return {
        "flops_per_token": speed.flops_per_token,
        "recomputed_flops_per_token": speed.recomputed_flops_per_token,
        "quantized_flops_per_token": speed.quantized_flops_per_token,
        "tokens_per_step": speed.tokens_per_step,
        "tokens": tokens,
        "matmul_seconds": speed.matmul,
        "memory_seconds": speed.memory,
        "network_seconds": speed.network,
        "bound_by": speed.bound_by,
        "overlapped": ends(speed.step_overlapped),
        "in_turn": ends(speed.step_in_turn),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
