"""How exactly products are computed: of float32 arrays in float32, on every device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def exact(equation: str, a: Array, b: Array) -> Array:
    """The einsum of two arrays of one dtype, summed up in float32, and in float32.

    Left to themselves, GPUs multiply float32 matrices as TF32, and TPUs as bfloat16.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
