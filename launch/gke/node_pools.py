"""What Google calls the node pools of GKE: labels, chips of a node, and the network between GPU nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sealion_jax.errors import UserError
from sealion_jax.planning.topology import Topology

# docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: values of the label gke-tpu-accelerator.
TPU_LABELS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# docs.cloud.google.com/kubernetes-engine/docs/how-to/gpus: values of the label gke-accelerator. The H100s of
# A3 Mega are nvidia-h100-mega-80gb: --accelerator names them.
GPU_LABELS = {
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
RDMA_GPUS = ("h200", "b200")
"""A3 Ultra and A4: an RDMA adapter for each GPU. A3 High and Mega have GPUDirect-TCPX(O) instead."""
ADAPTERS = 8
"""RDMA adapters, and GPUs, of such a node; a pod takes all of them. Others have no more GPUs either."""

FLAT_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Of v5e and v6e."""
SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""Of v4, v5p and TPU7x; above, each number is a multiple of 4 and none is less than the one before it."""


@dataclass(frozen=True, kw_only=True)
class NodePool:
    """The nodes of one slice of TPUs, or of all GPUs."""

    selector: dict[str, str]
    resource: str
    """What a pod asks the node for: google.com/tpu or nvidia.com/gpu."""
    chips_per_node: int
    devices_per_node: int
    """JAX's: a TPU7x chip is two."""
    nodes: int
    """Of each slice."""
    slices: int
    rdma: bool = False


def node_pool(
    topology: Topology, *, chips_per_node: int | None = None, accelerator: str | None = None
) -> NodePool:
    """The node pool that a topology means.

    Args:
        chips_per_node: of v5e and v6e, where Google offers several machines; None takes the usual one.
        accelerator: the label's value, where it is not the usual one.

    Raises:
        UserError: no such slice is offered.
    """
    if topology.is_tpu:
        return _tpu_pool(topology, chips_per_node, accelerator)
    if chips_per_node is not None:
        raise UserError(
            "--chips-per-node is for TPUs; the GPUs of a node are in the topology, as in h100:4x8"
        )
    chip, gpus = topology.chip.name, topology.shape[0]
    most = 16 if accelerator == "nvidia-tesla-a100" else ADAPTERS
    if gpus > most:
        raise UserError(
            f"--topology {topology.name}: nodes have {most} GPUs at most; give more nodes, as in "
            f"{chip}:{math.ceil(topology.num_chips / most)}x{most}"
        )
    rdma = chip in RDMA_GPUS and topology.num_slices > 1
    if rdma and gpus != ADAPTERS:
        raise UserError(
            f"--topology {topology.name}: the network between these nodes is {ADAPTERS} adapters for "
            f"{ADAPTERS} GPUs; take whole nodes, as in {chip}:{topology.num_slices}x{ADAPTERS}"
        )
    return NodePool(
        selector={"cloud.google.com/gke-accelerator": accelerator or GPU_LABELS[chip]},
        resource="nvidia.com/gpu",
        chips_per_node=gpus,
        devices_per_node=gpus,
        nodes=topology.num_slices,
        slices=1,
        rdma=rdma,
    )


def _tpu_pool(topology: Topology, chips_per_node: int | None, accelerator: str | None) -> NodePool:
    shape = "x".join(map(str, topology.shape))
    chips = math.prod(topology.shape)
    flat = topology.chip.torus_axes == 2
    if flat and shape not in FLAT_SHAPES:
        raise UserError(f"--topology {topology.name}: GKE has slices of {', '.join(FLAT_SHAPES)}")
    if not flat and shape not in SMALL_CUBES and not _is_cubes(topology.shape):
        raise UserError(
            f"--topology {topology.name}: GKE has slices of {', '.join(SMALL_CUBES)}, and larger ones "
            "of three multiples of 4, smallest first, such as 4x4x8"
        )
    # Machines of v5e and v6e have 1, 4 or 8 chips; 8 are a slice of their own, larger slices have nodes of 4.
    usual = chips if flat and chips <= 8 else 4
    offered = {usual, 4} if flat and chips > 1 else {usual}
    if chips_per_node is not None and chips_per_node not in offered:
        known = " or ".join(map(str, sorted(offered)))
        raise UserError(f"--chips-per-node {chips_per_node}: nodes of {topology.name} have {known} chips")
    each = chips_per_node or usual
    if chips == each and topology.num_slices > 1:
        raise UserError(
            f"--slices {topology.num_slices} of {topology.name}: GKE joins slices of several nodes only, and "
            "this one is a single node; take a larger slice"
        )
    return NodePool(
        selector={
            "cloud.google.com/gke-tpu-accelerator": accelerator or TPU_LABELS[topology.chip.name],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        resource="google.com/tpu",
        chips_per_node=each,
        devices_per_node=each * topology.chip.devices,
        nodes=chips // each,
        slices=topology.num_slices,
    )


def _is_cubes(shape: tuple[int, ...]) -> bool:
    return all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
