"""How exactly products are computed: of float32 arrays in float32, on every device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

FLOAT32_BYTES = 4


def exact(equation: str, a: Array, b: Array) -> Array:
    """The einsum of two arrays of one dtype, summed up in float32, and in float32.

    Left to themselves, GPUs multiply float32 matrices as TF32, and TPUs as bfloat16.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def exact_of_tokens(equation: str, a: Array, b: Array) -> Array:
    """`exact` for arrays whose axes begin with B and T, which become one axis.

    XLA's CPU compiler makes a transposed copy, slowly, of an operand that is summed over two leading axes;
    over one the product reads it as it lies.
    """
    operands, result = equation.split("->")
    rows = a.shape[:2]
    merged = [
        x.reshape(-1, *x.shape[2:]) if letters.startswith("BT") else x
        for letters, x in zip(operands.split(","), (a, b), strict=True)
    ]
    y = exact(equation.replace("B", ""), *merged)
    return y.reshape(*rows, *y.shape[1:]) if result.startswith("BT") else y
