"""The keys and values that decoding goes by: of a local layer only those that its window still shows.

A row's token at position p lies in slot p % slots. A global layer has a slot for every position, a local one
no more than its window: there a new token takes the place of the one that leaves the window with it.

    local layer, window 4:      slot            0  1  2  3
    six tokens so far           holds position  4  5  2  3     the token at 6 sees 3 4 5 and itself
    the token at 6 is added     holds position  4  5  6  3     the token at 7 sees 4 5 6 and itself

Rows are of unequal length, so each has its own positions. The arrays of layers that are scanned over have a
leading axis of blocks, as their parameters do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sealion_jax.layout import Layout
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import Memory


class KeysValues(NamedTuple):
    """Rotated keys, and values, of one layer or of a stack of layers."""

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K H"]


def num_slots(window: int | None, capacity: int) -> int:
    """Slots of a layer in a cache for rows of up to `capacity` tokens."""
    return capacity if window is None else min(window, capacity)


def slot_positions(lengths: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """The position that each slot holds once a row has so many tokens; negative where it holds none yet."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def kept(
    keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], lengths: Int[Array, " B"], *, slots: int
) -> KeysValues:
    """The slots after the first `lengths` tokens of each row; those that hold none have anything in them."""
    T = keys.shape[1]
    if slots >= T:
        spare = ((0, 0), (0, slots - T), (0, 0), (0, 0))
        return KeysValues(jnp.pad(keys, spare), jnp.pad(values, spare))
    index = jnp.maximum(slot_positions(lengths, slots), 0)[:, :, None, None]
    return KeysValues(jnp.take_along_axis(keys, index, axis=1), jnp.take_along_axis(values, index, axis=1))


def appended(cache: Memory, new: Memory, positions: Int[Array, " B"], *, layout: Layout) -> Memory:
    """The cache with one more token in every row, at `positions`, whose keys and values are `new`."""

    def append(leaf: Array, token: Array) -> Array:
        batch = leaf.ndim - 4
        set_slot = jax.vmap(
            lambda row, at, slot: jax.lax.dynamic_update_slice_in_dim(row, at, slot, axis=batch),
            in_axes=(batch, batch, 0),
            out_axes=batch,
        )
        leaf = set_slot(leaf, token, positions % leaf.shape[batch + 1])
        return layout.activation(leaf, ("layers",) * batch + ("batch", "tokens", "kv_heads", "head_dim"))

    return jax.tree.map(append, cache, new)


def cache_bytes(config: Gemma3Config, tokens: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of the cache of one row of `tokens` tokens."""
    windows = [
        None if config.is_global(layer) else config.sliding_window_tokens
        for layer in range(config.num_layers)
    ]
    slots = sum(num_slots(window, tokens) for window in windows)
    return slots * 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
