"""How long collectives take on a pod's links: peak rates, each collective alone, nothing lost to latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sealion_jax.hardware import Chip
from sealion_jax.planning.collectives import Collective, Kind
from sealion_jax.planning.topology import ON_CHIP_LINKS, Topology


class Place(NamedTuple):
    """Where a device is."""

    slice: int
    """Or node."""
    coordinates: tuple[int, ...]
    """Of its chip in the slice's torus, or its number in the node."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """What joins the devices of a group."""

    slices: int
    """That it has devices in."""
    inside: int
    """Its devices in each of them."""
    gb_per_s: float
    """That a chip can receive over its links, from this group's other chips in the slice."""
    link_gb_per_s: float
    """Of that, over one link."""
    sharing: float
    """Devices of a chip that want different things over the same links."""


class Seconds(NamedTuple):
    """A collective's time on the links inside of slices, and on the network between them."""

    links: float
    network: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of a kind over the same axes, in a step."""

    kind: Kind
    axes: tuple[str, ...]
    group_size: int
    count: int
    """Executions in a step."""
    received_bytes: float
    """By a device, in a step."""
    seconds: Seconds
    written_as: tuple[str, ...] = ()
    """What the compiled program calls them."""
    at_least: bool = False
    """Some are in loops whose trips the program's text does not tell."""


def places_of(devices: Sequence[Any]) -> list[Place]:
    """Where TPU devices are, in their order."""
    return [Place(getattr(device, "slice_index", None) or 0, tuple(device.coords)) for device in devices]


def gpu_places(topology: Topology) -> list[Place]:
    """Where the GPUs of a pod are: node by node."""
    (gpus,) = topology.shape
    return [Place(number // gpus, (number % gpus,)) for number in range(topology.num_devices)]


def path_of(group: Sequence[int], places: Sequence[Place], topology: Topology) -> Path:
    """How a group of devices is joined; groups are taken to lie evenly over slices and chips."""
    members = [places[device] for device in group]
    slices = {place.slice for place in members}
    inside = [place for place in members if place.slice == members[0].slice]
    chips = {place.coordinates for place in inside}
    chip = topology.chip
    if not topology.is_tpu:
        rate = chip.link_gb_per_s
        return Path(slices=len(slices), inside=len(inside), gb_per_s=rate, link_gb_per_s=rate, sharing=1.0)
    links = 0
    for axis, (size, ring) in enumerate(zip(topology.shape, topology.rings, strict=True)):
        used = len({coordinates[axis] for coordinates in chips})
        if used > 1:
            links += 2 if ring and used == size else 1
    sharing, at_once = chip.devices * len(chips) / len(inside), 1
    if not links:
        links, sharing, at_once = ON_CHIP_LINKS, 1.0, ON_CHIP_LINKS
    return Path(
        slices=len(slices),
        inside=len(inside),
        gb_per_s=links * chip.link_gb_per_s,
        link_gb_per_s=at_once * chip.link_gb_per_s,
        sharing=sharing,
    )


def seconds(kind: Kind, array_bytes: float, path: Path, topology: Topology) -> Seconds:
    """The time of one collective of a whole array of so many bytes.

    Over several slices each device fetches its part of what the others have over the network, and the
    devices of a slice share it over their links: as little as the network can be asked for.

    Of a collective-permute each device sends its array to one other, over one link where they are neighbours,
    or where some pair is in two slices, over the chip's share of the network, and the slowest pair decides.
    """
    chip = topology.chip
    if kind == "collective-permute":
        return _permute_seconds(array_bytes, path, chip)
    rounds = 2 if kind == "all-reduce" else 1
    links = 0.0
    if path.inside > 1:
        part = (path.inside - 1) / path.inside
        links = rounds * array_bytes * part * path.sharing / (path.gb_per_s * 1e9)
    network = 0.0
    if path.slices > 1:
        part = (path.slices - 1) / path.slices / path.inside
        network = rounds * array_bytes * part * chip.devices / (chip.network_gb_per_s * 1e9)
    return Seconds(links, network)


def _permute_seconds(array_bytes: float, path: Path, chip: Chip) -> Seconds:
    if path.slices > 1:
        # With one device of a chip in the group the chip's others cross, too, each in a group of its own.
        sharing = chip.devices if path.inside == 1 else path.sharing
        return Seconds(0.0, array_bytes * sharing / (chip.network_gb_per_s * 1e9))
    if path.inside == 1:
        return Seconds(0.0, 0.0)
    return Seconds(array_bytes * path.sharing / (path.link_gb_per_s * 1e9), 0.0)


def traffic_of(found: Sequence[Collective], places: Sequence[Place], topology: Topology) -> list[Traffic]:
    """The collectives of a compiled program by kind and axes, the one that takes longest first."""
    groups: dict[tuple[Kind, tuple[str, ...], int], list[Collective]] = {}
    for collective in found:
        key = (collective.kind, collective.axes, collective.group_size)
        groups.setdefault(key, []).append(collective)
    rows = []
    for (kind, axes, size), members in groups.items():
        times = np.zeros(2)
        for one in members:
            path = path_of(max(one.groups, key=len), places, topology)
            times += one.executions * np.array(seconds(kind, one.array_bytes, path, topology))
        rows.append(
            Traffic(
                kind=kind,
                axes=axes,
                group_size=size,
                count=sum(one.executions for one in members),
                received_bytes=sum(one.step_bytes for one in members),
                seconds=Seconds(*times.tolist()),
                written_as=tuple(sorted({one.opcode for one in members})),
                at_least=any(one.at_least for one in members),
            )
        )
    return sorted(rows, key=lambda row: -sum(row.seconds))


def group_along(axes: Sequence[str], mesh_shape: Mapping[str, int]) -> list[int]:
    """The devices that the first one shares a group with, over these axes of the mesh."""
    numbers = np.arange(int(np.prod(list(mesh_shape.values())))).reshape(tuple(mesh_shape.values()))
    return numbers[tuple(slice(None) if axis in axes else 0 for axis in mesh_shape)].ravel().tolist()
