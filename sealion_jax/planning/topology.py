"""Pods by name: how many chips of which kind, how they are joined, and the devices to compile for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from sealion_jax.config_tree import nearest
from sealion_jax.errors import UserError
from sealion_jax.hardware import GPUS, TPUS, Chip
from sealion_jax.sharding import MeshConfig, make_mesh, mesh_shape

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, v4:4x4x4, h100:8x8 (nodes x GPUs)"
SLICES_AXIS = "data"
"""The mesh axis that several slices, or nodes, are along: the slow network is for it."""
ON_CHIP_LINKS = 6
"""How many links' worth the connection of a chip's two devices has (docs.cloud.google.com/tpu/docs/tpu7x)."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Slices of TPU chips in a torus, or nodes of GPUs at a switch."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each direction of a slice, or GPUs of a node."""
    num_slices: int
    """Or nodes."""

    @property
    def is_tpu(self) -> bool:
        """Whether the step can be compiled for it here."""
        return self.chip in TPUS

    @property
    def platform(self) -> str:
        """Of its devices, as JAX has it."""
        return "tpu" if self.is_tpu else "gpu"

    @property
    def num_chips(self) -> int:
        """In all slices together."""
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        """JAX's, in all slices together."""
        return self.num_chips * self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each direction whether its chips are closed into a ring."""
        ring_from = self.chip.ring_from
        if not ring_from:
            return (False,) * len(self.shape)
        whole = self.chip.torus_axes == 2 or all(size % ring_from == 0 for size in self.shape)
        return tuple(whole and size % ring_from == 0 for size in self.shape)

    def describe(self) -> str:
        """In words, for the head of a report."""
        chips = f"{self.num_chips} chips" if self.is_tpu else f"{self.num_chips} GPUs"
        if not self.is_tpu:
            return f"{self.name}: {chips} in {self.num_slices} nodes"
        slices = f" in {self.num_slices} slices" if self.num_slices > 1 else ""
        rings = [
            f"{size} ({'ring' if ring else 'line'})"
            for size, ring in zip(self.shape, self.rings, strict=True)
        ]
        return f"{self.name}: {chips}{slices}, {self.num_devices} devices; torus {' x '.join(rings)}"


def parse_topology(name: str, *, num_slices: int = 1) -> Topology:
    """The pod that a name such as `v5p:4x4x4` or `h100:8x8` means.

    Args:
        num_slices: of TPUs, each of this shape, joined by the data centre's network. A GPU pod's name has its
            nodes in it.

    Raises:
        UserError: the name is not of a pod that is known here; tells which are.
    """
    kind, _, sizes = name.partition(":")
    chips = {chip.name: chip for chip in (*TPUS, *GPUS)}
    if kind not in chips:
        close = nearest(kind, list(chips))
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"unknown chip {kind!r} in --topology {name}; {hint}Known: {', '.join(chips)}; {EXAMPLES}"
        )
    chip = chips[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--topology {name}: expected the chip and its numbers, such as {EXAMPLES}")
    shape = tuple(int(size) for size in sizes.split("x"))
    if num_slices < 1:
        raise UserError(f"--num-slices is {num_slices}; it must be at least 1")
    if chip in GPUS:
        if len(shape) != 2:
            raise UserError(f"--topology {name}: a GPU pod is nodes x GPUs of a node, such as {kind}:8x8")
        if num_slices != 1:
            raise UserError(
                f"--num-slices is for TPUs; the nodes of a GPU pod are in its name, as in {kind}:8x8"
            )
        return Topology(name=name, chip=chip, shape=shape[1:], num_slices=shape[0])
    if len(shape) != chip.torus_axes:
        example = "x".join(["4"] * chip.torus_axes)
        raise UserError(
            f"--topology {name}: {kind} chips are joined in {chip.torus_axes} directions; give that many "
            f"numbers, such as {kind}:{example}"
        )
    _check_is_sold(name, chip, shape)
    return Topology(name=name, chip=chip, shape=shape, num_slices=num_slices)


def _check_is_sold(name: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """Raises UserError where a slice is larger than any that there is."""
    chips, most, side = math.prod(shape), chip.max_slice_chips, chip.max_side_chips
    if most is not None and chips > most:
        raise UserError(
            f"--topology {name}: a slice of {chips:,} chips, and the largest of {chip.name} that a job can "
            f"have is of {most:,}; take a smaller one, and several of them with --num-slices "
            f"{math.ceil(chips / most)} or more"
        )
    if side is not None and max(shape) > side:
        raise UserError(
            f"--topology {name}: {max(shape)} chips along one direction, and a pod of {chip.name} has "
            f"{side}; take a shape within {chip.name}:{'x'.join([str(side)] * chip.torus_axes)}, or several "
            "slices with --num-slices"
        )


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU pod, to compile for; needs libtpu.

    Raises:
        UserError: the compiler knows no slice of this shape.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental.topologies import get_topology_desc

    options: dict[str, Any] = {}
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as JAX has them on a v4
    try:
        return get_topology_desc(topology.name, platform="tpu", **options).devices
    except JaxRuntimeError as error:
        raise UserError(
            f"--topology {topology.name}: TPU's compiler has no such slice ({str(error).splitlines()[0]}); "
            f"take a shape that is sold, such as {EXAMPLES}"
        ) from error


def plan_mesh(config: MeshConfig, topology: Topology, devices: Sequence[Any]) -> Mesh:
    """The recipe's mesh over these devices; of several slices, slices are outermost in the axis `data`.

    Raises:
        UserError: the axes do not multiply to the devices, or another axis than `data` would cross slices.
    """
    check_slices(config, topology)
    return make_mesh(config, devices)


def check_slices(config: MeshConfig, topology: Topology) -> None:
    """Raises UserError unless TPU slices lie along the axis `data` alone."""
    shape = mesh_shape(config, topology.num_devices)
    if topology.is_tpu and shape[SLICES_AXIS] % topology.num_slices:
        raise UserError(
            f"mesh {shape} over {topology.num_slices} slices: the axis data must be a multiple of the "
            "slices, so that only gradients cross the slow network between them; "
            f"try --mesh.data {topology.num_slices} --mesh.fsdp -1"
        )
