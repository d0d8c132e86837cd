"""Rows of an embedding for tokens, over a mesh: the columns gathered once, the gradient scattered once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sealion_kernels.split import EMBEDDING, HIDDEN, TOKENS, Part, Split, over


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(
    embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any, split: Split | None = None
) -> Float[Array, "B T D"]:
    """The tokens' rows in another dtype; the gradient of each row is summed up in float32.

    Args:
        tokens: in [0, V).
        split: how the arrays lie over a mesh; None where there is one device.
    """

    def local(embedding: Array, tokens: Array) -> Array:
        part = Part(split)
        if split is None:
            return embedding[tokens].astype(dtype)
        whole = part.gathered(embedding, dtype)
        place, here = _places(tokens, whole.shape[0], part)
        found = jnp.where(here[..., None], whole.at[place].get(mode="clip"), 0)
        return part.over_vocabulary(jax.lax.psum, found)

    return over(split, local, (EMBEDDING, TOKENS), HIDDEN)(embedding, tokens)


def _places(tokens: Array, rows: int, part: Part) -> tuple[Array, Array]:
    """Where in this device's rows the tokens' are, and whether they are there."""
    place = tokens - part.first_id(rows)
    return place, (place >= 0) & (place < rows)


def _forward(embedding: Array, tokens: Array, dtype: Any, split: Split | None):
    like = jax.ShapeDtypeStruct(embedding.shape, embedding.dtype)
    return lookup(embedding, tokens, dtype, split), (tokens, _Like(like))


class _Like:
    """A shape and dtype that go along as if they were an array of none."""

    def __init__(self, shape: jax.ShapeDtypeStruct):
        self.shape, self.dtype = shape.shape, shape.dtype


jax.tree_util.register_pytree_node(
    _Like, lambda like: ((), (like.shape, like.dtype)), lambda aux, _: _Like(jax.ShapeDtypeStruct(*aux))
)


def _backward(dtype: Any, split: Split | None, saved: tuple[Array, _Like], d_rows: Array):
    del dtype
    tokens, like = saved
    rows = like.shape[0] // (1 if split is None else split.parts("vocab"))

    def local(tokens: Array, d_rows: Array) -> Array:
        part = Part(split)
        place, here = _places(tokens, rows, part)
        d_embedding = jnp.zeros((rows, d_rows.shape[-1]), jnp.float32)
        place = jnp.where(here, place, rows)  # past the end: dropped
        return part.scattered(d_embedding.at[place].add(d_rows.astype(jnp.float32), mode="drop"))

    return over(split, local, (TOKENS, HIDDEN), EMBEDDING)(tokens, d_rows).astype(like.dtype), None


lookup.defvjp(_forward, _backward)
