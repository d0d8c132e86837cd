"""Block sizes by implementation, device and shape, in one place.

What was measured on a device stands in `tuned.json`, written by `python -m sealion_kernels.tune`; for the
rest there are rules, in the modules of each implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu_blocks import tiles
from sealion_kernels.targets import Target
from sealion_kernels.tpu_blocks import num_cores, tpu_blocks, vmem_bytes
from sealion_kernels.tuned import best


@dataclass(frozen=True, kw_only=True)
class AttentionBlocks:
    """Block sizes of each pass."""

    forward: BlockSizes
    backward: BlockSizes
    backward_queries: BlockSizes | None = None
    """Of the gradients of queries, where a kernel of their own computes them; None: those of `backward`."""
    vmem_bytes: int = 16 * 2**20
    """Of a TPU core's vector memory, what a kernel may take: its blocks are made smaller to fit."""
    cores: int = 1
    """Of a TPU, that share the work of a kernel."""


def attention_blocks(
    implementation: str,
    target: Target,
    *,
    num_queries: int,
    num_keys: int,
    window: int | None,
    head_dim: int,
    group: int,
    itemsize: int = 2,
) -> AttentionBlocks:
    """The block sizes for a shape on a device; never larger than the lengths need.

    Args:
        window: of a local layer; None on a global one.
        group: query heads for each key-value head.
        itemsize: bytes of an element of the inputs.
    """
    vmem = vmem_bytes(target)
    measured = best(
        implementation,
        target,
        length=max(num_queries, num_keys),
        window=window,
        head_dim=head_dim,
        group=group,
        itemsize=itemsize,
    )
    if measured is not None:
        return AttentionBlocks(
            forward=measured.forward,
            backward=measured.backward,
            backward_queries=measured.backward_queries,
            vmem_bytes=vmem,
            cores=num_cores(target),
        )
    if implementation == "gpu":
        found = tiles(
            target, num_queries=num_queries, num_keys=num_keys, head_dim=head_dim, itemsize=itemsize
        )
        return AttentionBlocks(forward=found.forward, backward=found.keys, backward_queries=found.queries)
    if implementation == "tpu":
        sizes = tpu_blocks(window, itemsize)
        return AttentionBlocks(forward=sizes, backward=sizes, vmem_bytes=vmem, cores=num_cores(target))
    size = _blockwise(max(num_queries, num_keys), window)
    sizes = BlockSizes(query=min(size, num_queries), key=min(size, num_keys))
    return AttentionBlocks(forward=sizes, backward=sizes)


def _blockwise(length: int, window: int | None) -> int:
    """Small where rows are short, for a CPU's cache; larger where they are long, for fewer loop turns."""
    size = 128 if length <= 2048 else 256
    return size if window is None else min(size, max(128, window // 4))
