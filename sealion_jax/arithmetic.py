"""How a product of activations and a weight is computed: exactly, or with both quantised to eight bits.

Only products with weights are ever quantised. Attention's products, the lookup of embeddings, the logits,
norms and the optimizer stay as they are, and so do the master weights: they are quantised in every step anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax.numpy as jnp
from jaxtyping import Array

from sealion_jax.errors import UserError

Quantization = Literal["none", "int8", "fp8"]


class Arithmetic(Protocol):
    """The three products of a layer with a weight; hashable."""

    def forward(self, equation: str, x: Array, weight: Array) -> Array:
        """The result, in x's dtype."""
        ...

    def to_input(self, equation: str, d_y: Array, weight: Array) -> Array:
        """The gradient of x, in its dtype."""
        ...

    def to_weight(self, equation: str, x: Array, d_y: Array) -> Array:
        """The gradient of the weight, float32."""
        ...


@dataclass(frozen=True)
class Exact:
    """In the dtype of the operands, summed up in float32."""

    def forward(self, equation: str, x: Array, weight: Array) -> Array:
        return jnp.einsum(equation, x, weight)

    def to_input(self, equation: str, d_y: Array, weight: Array) -> Array:
        return jnp.einsum(equation, d_y, weight)

    def to_weight(self, equation: str, x: Array, d_y: Array) -> Array:
        return jnp.einsum(equation, x, d_y, preferred_element_type=jnp.float32)


EXACT = Exact()


@dataclass(frozen=True)
class Quantized(Exact):
    """Forward and to the input in eight bits, by qwix; to the weight exactly.

    Each row of an operand has a scale of its own, its largest absolute value over what is summed over, so no
    token or channel is drowned by another. Gradients of weights are where noise adds up, and stay exact.
    """

    forward_dtype: Any
    """Of activations and weights."""
    backward_dtype: Any
    """Of gradients of activations."""

    def forward(self, equation: str, x: Array, weight: Array) -> Array:
        return self._product(equation, x, weight, self.forward_dtype)

    def to_input(self, equation: str, d_y: Array, weight: Array) -> Array:
        return self._product(equation, d_y, weight, self.backward_dtype)

    def _product(self, equation: str, x: Array, weight: Array, dtype: Any) -> Array:
        import qwix

        operands, result = equation.split("->")
        of_x, of_weight = operands.split(",")

        def quantized(array: Array, letters: str, dtype: Any) -> Any:
            kept = tuple(k for k, letter in enumerate(letters) if letter in result)
            scaled = array.astype(jnp.float32)
            return qwix.quantize(scaled, dtype, channelwise_axes=kept)

        product = qwix.einsum(
            equation,
            quantized(x, of_x, dtype),
            quantized(weight, of_weight, self.forward_dtype),
        )
        return product.astype(x.dtype)


def arithmetic_of(quantization: Quantization) -> Arithmetic:
    """The arithmetic that a recipe asks for.

    Raises:
        UserError: it needs qwix, which is not installed.
    """
    if quantization == "none":
        return EXACT
    try:
        import qwix  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"compute.quantization {quantization} needs qwix: pip install 'sealion_jax[quantization]', or "
            "set it to none"
        ) from error
    if quantization == "int8":
        return Quantized(jnp.int8, jnp.int8)
    return Quantized(jnp.float8_e4m3fn, jnp.float8_e5m2)


def to_input(arithmetic: Arithmetic, equation: str, d_y: Array, weight: Array) -> Array:
    """The gradient of x, where y is the product of x and the weight by the equation."""
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    return arithmetic.to_input(f"{result},{of_weight}->{of_x}", d_y, weight)


def to_weight(arithmetic: Arithmetic, equation: str, x: Array, d_y: Array) -> Array:
    """The gradient of the weight, float32, where y is the product of x and the weight by the equation."""
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    return arithmetic.to_weight(f"{of_x},{result}->{of_weight}", x, d_y)
