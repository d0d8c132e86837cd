"""How parameters are drawn, and what their axes are called."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """Draws parameters, each with the names of its axes; `stack` layers at once where it is set."""

    rngs: nnx.Rngs
    dtype: jax.typing.DTypeLike
    stack: int | None = None

    def matrix(self, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int) -> nnx.Param:
        """Normal with variance 1 / fan_in, so that activations of unit variance stay so."""
        shape, axes = self._stacked(shape, axes)
        value = jax.random.normal(self.rngs.params(), shape, self.dtype) * fan_in**-0.5
        return nnx.Param(value.astype(self.dtype), axes=axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        shape, axes = self._stacked(shape, axes)
        return nnx.Param(jnp.zeros(shape, self.dtype), axes=axes)

    def _stacked(
        self, shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return (shape, axes) if self.stack is None else ((self.stack, *shape), ("layers", *axes))


def own_axes(param: nnx.Param) -> tuple[str, ...]:
    """The names of a parameter's axes as one layer has it: inside a scan, the stack's axis is gone."""
    axes = param.get_metadata("axes")
    return axes[len(axes) - param[...].ndim :]
