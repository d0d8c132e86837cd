"""Attention and linear cross-entropy for long sequences and large vocabularies; stands alone on JAX."""

from sealion_kernels.attention import flash_attention
from sealion_kernels.cross_entropy import linear_cross_entropy
from sealion_kernels.masks import AttentionMask

__all__ = ["AttentionMask", "flash_attention", "linear_cross_entropy"]
