"""A table of V rows, such as a tied embedding, and the tokens that use it, over a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the arrays lie over a mesh; axes of size 1 do no harm."""

    mesh: Mesh
    rows: tuple[str, ...]
    """Axes that split B."""
    tokens: tuple[str, ...] = ()
    """Axes that split T."""
    vocab: tuple[str, ...] = ()
    """Axes that split V."""
    model: tuple[str, ...] = ()
    """Axes that split the embedding's D; hidden states are whole there. May be axes of rows or tokens."""

    def parts(self, *names: str) -> int:
        """Over how many devices the axes of these names split."""
        parts = 1
        for name in names:
            for axis in getattr(self, name):
                parts *= self.mesh.shape[axis]
        return parts


Dimensions = tuple[str | None, ...]
"""Which axes of a Split lie along the dimensions of an array."""

HIDDEN: Dimensions = ("rows", "tokens", None)
TOKENS: Dimensions = ("rows", "tokens")
EMBEDDING: Dimensions = ("vocab", "model")
WHOLE: Dimensions = ("vocab", None)
"""An embedding whose columns have been gathered."""
NOTHING: Dimensions = ()


def over(
    split: Split | None, local: Callable[..., Any], inputs: tuple[Dimensions, ...], outputs: Any
) -> Callable[..., Any]:
    """`local` on each device's part of the arrays; just `local` where nothing is split."""
    if split is None:
        return local

    def spec(dimensions: Dimensions) -> PartitionSpec:
        return PartitionSpec(*(None if name is None else getattr(split, name) or None for name in dimensions))

    return jax.shard_map(
        local,
        mesh=split.mesh,
        in_specs=tuple(map(spec, inputs)),
        out_specs=tuple(map(spec, outputs)) if isinstance(outputs, list) else spec(outputs),
        check_vma=False,
    )


class Part:
    """One device's part, and how it meets the others'; for use inside `over`."""

    def __init__(self, split: Split | None):
        self.vocab = () if split is None else split.vocab
        self.model = () if split is None else split.model
        self.tokens = () if split is None else (*split.rows, *split.tokens)
        self.copies = 1
        """Devices with the same tokens whose gradients are summed all the same."""
        for axis in self.model:
            self.copies *= 1 if split is None or axis in self.tokens else split.mesh.shape[axis]

    def gathered(self, embedding: Float[Array, "v d"], dtype: Any) -> Float[Array, "v D"]:
        """This device's rows of the embedding with all their columns, in the compute dtype."""
        embedding = embedding.astype(dtype)
        return jax.lax.all_gather(embedding, self.model, axis=1, tiled=True) if self.model else embedding

    def scattered(self, d_embedding: Float[Array, "v D"]) -> Float[Array, "v d"]:
        """The sum of all devices' gradients, of it this device's columns."""
        if self.model:
            d_embedding = jax.lax.psum_scatter(d_embedding, self.model, scatter_dimension=1, tiled=True)
        rest = tuple(axis for axis in self.tokens if axis not in self.model)
        d_embedding = jax.lax.psum(d_embedding, rest) if rest else d_embedding
        return d_embedding / self.copies if self.copies > 1 else d_embedding

    def summed(self, d_hidden: Array) -> Array:
        """The sum over the parts of the vocabulary."""
        return jax.lax.psum(d_hidden, self.vocab) if self.vocab else d_hidden

    def total(self, loss: Array) -> Array:
        """The sum over the devices' tokens."""
        return jax.lax.psum(loss, self.tokens) if self.tokens else loss

    def first_id(self, rows: int) -> Array | int:
        """The token id of this device's first row, where it has `rows` of them."""
        return jax.lax.axis_index(self.vocab) * rows if self.vocab else 0

    def over_vocabulary(self, reduce: Callable[..., Array], x: Array) -> Array:
        """x reduced (psum, pmax) over the parts of the vocabulary."""
        return reduce(x, self.vocab) if self.vocab else x
