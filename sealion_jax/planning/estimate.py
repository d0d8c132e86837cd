"""What a step takes of a device: by its compiled program, or by a formula where it cannot be compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from sealion_jax.planning import hlo
from sealion_jax.planning.collectives import collectives
from sealion_jax.planning.memory_traffic import memory_bytes
from sealion_jax.planning.network import Traffic, places_of, traffic_of
from sealion_jax.planning.step import Compiled, TooLarge, abstract_batch
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig
from sealion_jax.training.state import TrainState

Method = Literal["compiled", "analytical"]

GRADIENTS = "gradients"
ACTIVATIONS = "activations and temporaries"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and traffic of a step on one device."""

    method: Method
    memory: dict[str, float]
    """Bytes by kind; in all what has to fit."""
    available: float
    traffic: tuple[Traffic, ...] | None
    """None of a program that does not fit: the compiler gives none."""
    memory_traffic_bytes: float | None
    """Read from and written to the device's memory."""
    largest: tuple[str, ...] = ()
    """Of a program that does not fit, the largest allocations."""
    compile_seconds: float | None = None
    split: tuple[tuple[str, str], ...] = ()
    """(parameters of one shape, how they are split)."""
    at_least: bool = False
    """The memory is what the compiler had counted when it gave up."""

    @property
    def needed(self) -> float:
        """Bytes of all kinds."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough."""
        return self.traffic is not None and self.needed <= self.available

    @property
    def largest_kind(self) -> str:
        """The kind of memory that takes most."""
        return max(self.memory, key=lambda kind: self.memory[kind])


def state_bytes(state: TrainState, batch: Any) -> dict[str, float]:
    """Bytes of a device's part of what a step is given, by kind, from shapes and shardings."""
    kinds = {
        "weights": (state.params, state.frozen),
        "optimizer": state.optimizer,
        "batch": batch,
    }
    return {kind: float(sum(map(_shard_bytes, jax.tree.leaves(tree)))) for kind, tree in kinds.items()}


def gradient_bytes(state: TrainState) -> float:
    """Of a device's part of the gradients, which are float32 like the weights that are trained."""
    return float(sum(map(_shard_bytes, jax.tree.leaves(state.params))))


def split_of(state: TrainState) -> tuple[tuple[str, str], ...]:
    """For each kind of parameter its dimensions, each with the mesh axes that it is split over.

    Layers of the same kind are told once: `blocks/*/mlp/gate`, `[10, 5376 / fsdp, 21504]`.
    """
    found: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.frozen or {})):
        steps = [str(getattr(entry, "key", "")) for entry in path[1:]]
        name = "/".join("*" if step.startswith("layer_") else step for step in steps)
        spec = (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))
        found.setdefault(name, f"[{', '.join(map(_split, leaf.shape, spec))}]")
    return tuple(found.items())


def _split(size: int, axes: str | tuple[str, ...] | None) -> str:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return " / ".join([str(size), *names])


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def estimate_compiled(
    config: TrainConfig, state: TrainState, mesh: Mesh, topology: Topology, compiled: Compiled | TooLarge
) -> Estimate:
    """By the compiler's account of memory, and by the collectives in its program."""
    kinds = state_bytes(state, abstract_batch(config, mesh))
    available = topology.chip.hbm_bytes / topology.chip.devices
    gradients = gradient_bytes(state)
    if isinstance(compiled, TooLarge):
        given = 0.0 if compiled.temporaries_alone else sum(kinds.values())
        rest = max(compiled.needed - given - gradients, 0.0)
        return Estimate(
            method="compiled",
            memory={**kinds, GRADIENTS: gradients, ACTIVATIONS: rest},
            available=compiled.available,
            traffic=None,
            memory_traffic_bytes=None,
            largest=compiled.largest,
            compile_seconds=compiled.seconds,
            split=split_of(state),
            at_least=compiled.temporaries_alone,
        )
    gradients = min(gradients, compiled.temporaries)
    padding = max(compiled.arguments - sum(kinds.values()), 0.0)
    memory = {
        **kinds,
        "padding of these": padding,
        GRADIENTS: gradients,
        ACTIVATIONS: compiled.temporaries - gradients,
        "outputs beside the state": float(max(compiled.outputs - compiled.aliased, 0)),
        "program": float(compiled.code),
    }
    found = collectives(compiled.text, dict(mesh.shape))
    devices: Sequence[Any] = mesh.devices.ravel().tolist()
    return Estimate(
        method="compiled",
        memory=memory,
        available=available,
        traffic=tuple(traffic_of(found, places_of(devices), topology)),
        memory_traffic_bytes=memory_bytes(hlo.parse(compiled.text)),
        compile_seconds=compiled.seconds,
        split=split_of(state),
    )
