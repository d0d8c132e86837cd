"""Block sizes and vector memory of the TPU kernels, by generation, and by whether a layer is local.

Nothing here was timed on a device. A local layer's blocks are half its window at most, so that little is
computed that the window hides; a global layer's are as large as pays for the overhead of a step of the grid.
A kernel makes them smaller where they do not fit into its share of VMEM (see `tpu.vmem`).
"""

from __future__ import annotations

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.targets import Target

MIB = 2**20

VMEM_MIB = {
    "TPU v4": 16,
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6": 128,
    "TPU7x": 64,
}
"""Of a core, by the start of its device kind; as JAX has them in `jax._src.pallas.mosaic.tpu_info`."""

SHARE = 0.75
"""Of it that a kernel may take: XLA keeps what the next operation needs in the rest."""

TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
"""Kinds whose JAX device is a chip of two cores; those of a TPU7x are devices of their own."""

GLOBAL = 1024
LOCAL = 512
SMALLEST = 128


def vmem_bytes(target: Target) -> int:
    """Of a core's vector memory, what a kernel may take; of an unknown generation, that of the smallest."""
    matching = [kind for kind in VMEM_MIB if target.kind.startswith(kind)]
    mib = VMEM_MIB[max(matching, key=len)] if matching else min(VMEM_MIB.values())
    return int(SHARE * mib * MIB)


def num_cores(target: Target) -> int:
    """Cores of a device, that share a kernel's work."""
    return 2 if target.kind in TWO_CORES else 1


def tpu_blocks(window: int | None, itemsize: int = 2) -> BlockSizes:
    """For a layer with this window, or for a global one, and elements of so many bytes.

    Products of float32 are six of bfloat16 each, and as many instructions: there blocks are smaller.
    """
    size = GLOBAL if itemsize == 2 else GLOBAL // 2
    if window is not None:
        size = max(SMALLEST, min(LOCAL, size, window // 2 // SMALLEST * SMALLEST))
    return BlockSizes(query=size, key=size)
