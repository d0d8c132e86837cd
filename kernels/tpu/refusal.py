"""What the TPU kernels cannot do."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.masks import AttentionMask
from sealion_kernels.tpu.geometry import LANES, Geometry
from sealion_kernels.tpu.vmem import by_query_block_bytes
from sealion_kernels.tpu_blocks import MIB, SHARE, VMEM_MIB

LARGEST_HEAD_DIM = 512


def refusal(query: Array, key: Array, mask: AttentionMask) -> str | None:
    """Why the TPU kernels cannot do it; None where they can."""
    if query.dtype != key.dtype or query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"multiplies float32 or bfloat16, not {query.dtype} queries by {key.dtype} keys"
    if query.shape[3] > LARGEST_HEAD_DIM:
        return f"holds head dims up to {LARGEST_HEAD_DIM} in VMEM, not {query.shape[3]}"
    # The kernel that needs the most of all, with the smallest blocks; on the generation that has the least.
    smallest = Geometry.of(query, key, mask, BlockSizes(query=LANES, key=LANES), scale=1.0)
    if by_query_block_bytes(smallest) > SHARE * min(VMEM_MIB.values()) * MIB:
        return (
            f"holds all {smallest.group} query heads of a key-value head in VMEM, where those of head dim "
            f"{query.shape[3]} in {query.dtype} do not fit"
        )
    return None
