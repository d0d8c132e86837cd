"""Attention on GPUs: Pallas kernels, lowered by way of Triton.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2; three kernels, one forward and two
backward, so that each gradient is summed by the one program that owns it, without atomics.
"""

from sealion_kernels.gpu.backward import backward
from sealion_kernels.gpu.forward import forward
from sealion_kernels.gpu.plan import refusal

__all__ = ["backward", "forward", "refusal"]
