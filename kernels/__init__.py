"""Attention and linear cross-entropy for long sequences and large vocabularies; stands alone on JAX."""

from sealion_kernels.attention import Passes, flash_attention, score_shift
from sealion_kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from sealion_kernels.lookup import lookup
from sealion_kernels.masks import AttentionMask
from sealion_kernels.split import Split
from sealion_kernels.targets import Target

__all__ = [
    "AttentionMask",
    "CrossEntropy",
    "Passes",
    "Split",
    "Target",
    "flash_attention",
    "linear_cross_entropy",
    "lookup",
    "score_shift",
]
