"""The device mesh, and the one place where logical axes of arrays are mapped to mesh axes.

Mesh axes, outermost first:

    data     whole copies of the model; gradients are averaged over it (the slow network between slices)
    fsdp     parameters and optimizer state are split over it, and gathered layer by layer
    context  the tokens of each row are split over it, for long rows; parameters as over fsdp
    tensor   heads, feed-forward and vocabulary are split over it, activations stay split in between

The batch's rows are split over data x fsdp. `layout.py` says how a model computes on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")
_AUTO = (AxisType.Auto,) * len(MESH_AXES)
BATCH_AXES = ("data", "fsdp")
WEIGHT_AXES = ("fsdp", "context")
"""Over which parameters are split, and gathered where they are used."""

LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "embed": WEIGHT_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
    "rank": None,
}

# Axes that are copied to every device when they do not divide: a single key-value head cannot be split.
REPLICATED_WHEN_UNEVEN = ("kv_heads",)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1: whatever is left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
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
            "set one of them (mesh.fsdp, say) to -1 to take what is left"
        )
    return {axis: num_devices // fixed if axis in free else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given), axes as in MESH_AXES, for automatic partitioning."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1 and devices[0].platform == "tpu":
        return _mesh_over_slices(shape, slices, devices)
    try:
        return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=_AUTO, devices=devices)
    except NotImplementedError:  # no axis has whole directions of the torus to itself
        from jax.experimental.mesh_utils import create_device_mesh

        ordered = create_device_mesh(tuple(shape.values()), devices=devices, allow_split_physical_axes=True)
        return Mesh(ordered, MESH_AXES, axis_types=_AUTO)


def _mesh_over_slices(shape: Mapping[str, int], slices: int, devices: Sequence[Any]) -> Mesh:
    """The mesh whose axis `data` has the slices outermost: only it crosses the slow network."""
    from jax.experimental.mesh_utils import create_hybrid_device_mesh

    if shape["data"] % slices:
        raise UserError(
            f"mesh {dict(shape)} over {slices} slices: mesh.data must be a multiple of {slices}, since only "
            f"data crosses the network between slices; try --mesh.data {slices} --mesh.fsdp -1"
        )
    inside = {**shape, "data": shape["data"] // slices}
    across = {axis: slices if axis == "data" else 1 for axis in shape}
    ordered = create_hybrid_device_mesh(tuple(inside.values()), tuple(across.values()), devices=devices)
    return Mesh(ordered, MESH_AXES, axis_types=_AUTO)


def mesh_axes(logical: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that a logical axis of parameters is split over, without those of one device."""
    over = LOGICAL_TO_MESH[logical]
    over = () if over is None else (over,) if isinstance(over, str) else over
    return tuple(axis for axis in over if mesh.shape[axis] > 1)


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh, *, name: str = "array"
) -> PartitionSpec:
    """How an array with these logical axes is split over the mesh.

    Raises:
        UserError: a dimension does not divide; tells the sizes that would.
    """
    entries: list[str | tuple[str, ...] | None] = []
    for logical, size in zip(axes, shape, strict=True):
        over = mesh_axes(logical, mesh)
        parts = math.prod(mesh.shape[axis] for axis in over)
        if size % parts == 0:
            entries.append(over if len(over) > 1 else over[0] if over else None)
        elif logical in REPLICATED_WHEN_UNEVEN:
            entries.append(None)
        else:
            fitting = [n for n in range(1, size + 1) if size % n == 0 and n <= 4096]
            axes_and_sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in over)
            raise UserError(
                f"{name}: its {logical} dimension {size} does not divide over {axes_and_sizes}; "
                f"sizes that do: {', '.join(map(str, fitting[:24]))}"
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


def check_tokens_divide(sequence_length_tokens: int, mesh: Mesh) -> None:
    """Raises UserError unless the tokens of a row split evenly over context."""
    if sequence_length_tokens % mesh.shape["context"]:
        raise UserError(
            f"sequence_length_tokens ({sequence_length_tokens}) must be a multiple of mesh.context "
            f"({mesh.shape['context']}); change one of them"
        )


def check_batch_divides(global_batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the batch's rows split evenly over data x fsdp."""
    devices = batch_devices(mesh)
    if global_batch_size % devices:
        below, above = global_batch_size // devices * devices, -(-global_batch_size // devices) * devices
        tries = " or ".join(str(n) for n in (below, above) if n)
        fits = next(n for n in range(devices, 0, -1) if global_batch_size % n == 0)
        raise UserError(
            f"global batch {global_batch_size} must be a multiple of {devices}, the data x fsdp devices. A "
            f"run that goes on keeps its batch, and can have {fits} of them: start it on fewer devices, or "
            f"with more for --mesh.tensor or --mesh.context. A new one can have a batch of {tries}"
        )


def microbatches_on(
    mesh: Mesh, *, global_batch_size: int, least: int = 1, rows_per_device: int | None = None
) -> int:
    """In how many parts a mesh computes the global batch: the fewest that keep to both bounds.

    A part has a row on each device at least, so where there are not so many rows there are fewer parts.

    Args:
        least: parts.
        rows_per_device: most rows of a part on a device; None for no bound.

    Raises:
        UserError: the batch does not divide.
    """
    check_batch_divides(global_batch_size, mesh)
    rows = global_batch_size // batch_devices(mesh)
    lowest = least if rows_per_device is None else max(least, -(-rows // rows_per_device))
    return next((parts for parts in range(lowest, rows) if rows % parts == 0), rows)


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
