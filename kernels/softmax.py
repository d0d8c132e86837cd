"""What all implementations of a blockwise softmax agree on."""

from __future__ import annotations

import math

import jax.numpy as jnp

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen: finite, so that no difference of two of them is nan."""

LOG2_E = math.log2(math.e)
"""Kernels raise 2, which is what the hardware does: the factor is one with the scale of the scores."""

ATTENTION_RESIDUALS = ("attention_out", "attention_log_sum")
"""Names, for a rematerialisation policy, of what the backward pass needs besides queries, keys and values."""
