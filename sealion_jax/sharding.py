"""The device mesh, and the one place where logical axes of arrays are mapped to mesh axes.

Mesh axes, outermost first:

    data    whole copies of the model; gradients are averaged over it (the slow network between slices)
    fsdp    parameters and optimizer state are split over it, and gathered layer by layer
    tensor  heads, feed-forward and vocabulary are split over it, activations stay split in between

The batch's rows are split over data x fsdp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_TO_MESH: Mapping[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
    "rank": None,
}

SPLIT_ACTIVATIONS = ("heads", "kv_heads", "mlp")

# Axes that are copied to every device when they do not divide: a single key-value head cannot be split.
REPLICATED_WHEN_UNEVEN = ("kv_heads",)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1: whatever is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        for axis, size in zip(MESH_AXES, sizes, strict=True):
            check_number(f"mesh.{axis}", size, whole=True)
        if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: "
                "sizes are positive, and at most one is -1 (what is left)"
            )


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis for `num_devices` in all.

    Raises:
        UserError: the axes' product is not `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if num_devices % fixed or (not free and fixed != num_devices):
        raise UserError(
            f"mesh {sizes} does not fit {num_devices} devices: the fixed axes multiply to {fixed}; "
            "set one of mesh.data, mesh.fsdp, mesh.tensor to -1 to take what is left"
        )
    return {axis: num_devices // fixed if axis in free else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given), axes (data, fsdp, tensor), for automatic partitioning."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(
        tuple(shape.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh, *, name: str = "array"
) -> PartitionSpec:
    """How an array with these logical axes is split over the mesh.

    Raises:
        UserError: a dimension does not divide; tells the sizes that would.
    """
    entries: list[str | None] = []
    for logical, size in zip(axes, shape, strict=True):
        axis = LOGICAL_TO_MESH[logical]
        if axis is None or mesh.shape[axis] == 1:
            entries.append(None)
        elif size % mesh.shape[axis] == 0:
            entries.append(axis)
        elif logical in REPLICATED_WHEN_UNEVEN:
            entries.append(None)
        else:
            fitting = [n for n in range(1, size + 1) if size % n == 0 and n <= 4096]
            raise UserError(
                f"{name}: its {logical} dimension {size} does not divide over "
                f"mesh.{axis}={mesh.shape[axis]}; sizes that do: {', '.join(map(str, fitting[:24]))}"
            )
    return PartitionSpec(*entries)


def param_shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter.

    Args:
        abstract: nested dict of ShapeDtypeStruct.
        axes: the same tree with a tuple of logical axis names at each leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        logical = axes
        for entry in path:
            logical = logical[entry.key]
        name = "/".join(str(entry.key) for entry in path)
        return NamedSharding(mesh, partition_spec(logical, leaf.shape, mesh, name=name))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def activation_layout(mesh: Mesh) -> Callable[[jax.Array, Sequence[str]], jax.Array]:
    """A function (activation, its axes' names) -> the activation, held to rows over data x fsdp.

    Heads and feed-forward columns stay split over tensor. Left to itself, the partitioner gathers the batch
    instead of the weights under fsdp.
    """

    def axis(name: str, size: int) -> str | tuple[str, ...] | None:
        if name == "batch":
            return BATCH_AXES
        split = name in SPLIT_ACTIVATIONS and size % mesh.shape["tensor"] == 0
        return "tensor" if split else None

    def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
        spec = PartitionSpec(*(axis(name, size) for name, size in zip(axes, x.shape, strict=True)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """The abstract tree with each leaf's sharding attached, as restores and streaming loads want it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over data x fsdp, for arrays whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Over how many parts the batch's rows are split: the devices along data x fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_divides(global_batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises UserError unless every microbatch splits evenly over data x fsdp."""
    devices = batch_devices(mesh)
    unit = devices * microbatches
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
        tries = " or ".join(str(n) for n in (below, above) if n)
        raise UserError(
            f"global batch {global_batch_size} must be a multiple of {unit} "
            f"({microbatches} microbatches x {devices} data x fsdp devices); try {tries}"
        )


def process_rows(sharding: NamedSharding, global_batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold, ascending.

    Processes that share a tensor group read the same rows.
    """
    indices = sharding.addressable_devices_indices_map((global_batch_size,))
    held = (range(*index[0].indices(global_batch_size)) for index in indices.values() if index is not None)
    return sorted({row for rows in held for row in rows})


def to_device(
    batch: Mapping[str, np.ndarray], rows: Sequence[int], sharding: NamedSharding, global_batch_size: int
) -> Any:
    """The global batch as sharded arrays [B, ...], from the rows of it that this process has read."""
    place = {row: k for k, row in enumerate(rows)}

    def put(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),))[0].indices(global_batch_size)
            return array[place[start] : place[start] + stop - start]

        return jax.make_array_from_callback((global_batch_size, *array.shape[1:]), sharding, shard)

    return {name: put(np.asarray(array)) for name, array in batch.items()}
