"""Attention as Pallas kernels for TPUs: blocks in VMEM, hidden blocks neither loaded nor computed.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2. Grouped query heads share the block of
keys that lies in VMEM; which blocks are loaded comes from `sealion_kernels.blocks`, by scalar prefetch.
"""

from sealion_kernels.tpu.backward import backward
from sealion_kernels.tpu.forward import forward
from sealion_kernels.tpu.refusal import refusal

__all__ = ["backward", "forward", "refusal"]
