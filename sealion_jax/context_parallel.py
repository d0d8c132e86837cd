"""Attention of rows whose tokens are split over devices: each device's queries against all keys they may see.

Each of C devices holds a run of T / C tokens of every row.

A local layer needs the window - 1 keys before its first query, so they are fetched from the devices before it
and put in front of its own. A global layer gathers all keys. Causality would give the last device by far the
most to do, so for it the run is exchanged for two half-runs, c and 2C - 1 - c of 2C, whose work together is
the same on every device:

    device         0        1        2        3
    has          0  1     2  3     4  5     6  7
    computes     0  7     6  1     2  5     4  3

The kernels know only queries at the end of their keys. So the keys are turned until the queries' own come
last; what was after them is then in front, and is given a segment of its own that no query sees: its blocks
are not even loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sealion_kernels import AttentionMask

UNSEEN = -1
"""The segment of keys that are not there for any query; real ones are 0 or more."""


def attend_over_context(
    attend: Callable[..., Array],
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    *,
    mask: AttentionMask,
    axis: str,
) -> Float[Array, "B t N H"]:
    """The mixed values of this device's tokens; to be called under `shard_map`.

    Args:
        attend: (query, key, value, mask=) -> mixed values.
        mask: of whole rows, its arrays those of this device's tokens.
        axis: the mesh axis that splits the tokens.

    Raises:
        ValueError: the mask is not causal, or has spans or an offset.
    """
    if not mask.causal or mask.query_spans is not None or mask.query_offset:
        raise ValueError(
            "tokens are split over mesh.context, where attention is causal, without spans and offsets; "
            "set mesh.context to 1 for others"
        )
    devices, here = jax.lax.axis_size(axis), query.shape[1]
    segments = mask.query_segments
    if segments is None:
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    tokens = _Keys(key, value, segments)
    back = 0 if mask.window is None else mask.window - 1
    if mask.window is not None and back <= here * (devices - 1):
        return _near(attend, query, tokens, mask=mask, axis=axis, back=back)
    if here % 2:
        return _far(attend, query, segments, tokens.gathered(axis), mask=mask, first=_run(axis, here))
    return _balanced(attend, query, tokens, mask=mask, axis=axis)


class _Keys:
    """Keys, values and their segments, along the same tokens."""

    def __init__(self, key: Array, value: Array, segments: Array):
        self.arrays = (key, value, segments)

    def map(self, function: Callable[[Array], Array]) -> _Keys:
        return _Keys(*map(function, self.arrays))

    def gathered(self, axis: str) -> _Keys:
        """Of all devices, in order."""
        return self.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True))

    def hidden_where(self, hidden: Array) -> _Keys:
        key, value, segments = self.arrays
        return _Keys(key, value, jnp.where(hidden, UNSEEN, segments))


def _run(axis: str, here: int) -> Array:
    """The index in the row of this device's first token."""
    return jax.lax.axis_index(axis) * here


def _near(
    attend: Callable[..., Array], query: Array, tokens: _Keys, *, mask: AttentionMask, axis: str, back: int
) -> Array:
    """A local layer: the device's own keys, and `back` of those before them."""
    here = query.shape[1]
    own = tokens
    whole, rest = divmod(back, here)
    pieces = [_from_before(own.map(lambda x: x[:, here - rest :]), axis, whole + 1)] if rest else []
    pieces += [_from_before(own, axis, distance) for distance in range(whole, 0, -1)]
    pieces.append(own)
    joined = _Keys(
        *(jnp.concatenate(parts, axis=1) for parts in zip(*(p.arrays for p in pieces), strict=True))
    )
    # What came round from the end of the row is before its beginning.
    index = _run(axis, here) - back + jnp.arange(back + here)
    joined = joined.hidden_where(index < 0)
    return _at_end(attend, query, own.arrays[2], joined, mask=mask)


def _from_before(tokens: _Keys, axis: str, distance: int) -> _Keys:
    """The same piece of the device `distance` places before this one; of the first ones', from the end."""
    devices = jax.lax.axis_size(axis)
    moves = [(c, (c + distance) % devices) for c in range(devices)]
    return tokens.map(lambda x: jax.lax.ppermute(x, axis, moves))


def _balanced(
    attend: Callable[..., Array], query: Array, tokens: _Keys, *, mask: AttentionMask, axis: str
) -> Array:
    """A global layer: two half-runs that together are as much work on every device."""
    devices, half = jax.lax.axis_size(axis), query.shape[1] // 2
    keys = tokens.gathered(axis)
    device = jax.lax.axis_index(axis)
    mixed = []
    for parity in range(2):
        # Half-run 2c + parity is computed on device 2c + parity, or, past the middle, counted from the end.
        halves = [2 * c + parity for c in range(devices)]
        there = [i if i < devices else 2 * devices - 1 - i for i in halves]
        moves = list(zip(range(devices), there, strict=True))
        ours = jnp.asarray([halves[there.index(c)] for c in range(devices)])[device]
        piece = slice(parity * half, (parity + 1) * half)
        moved, segments = (jax.lax.ppermute(x[:, piece], axis, moves) for x in (query, tokens.arrays[2]))
        out = _far(attend, moved, segments, keys, mask=mask, first=ours * half)
        mixed.append(jax.lax.ppermute(out, axis, [(to, c) for c, to in moves]))
    return jnp.concatenate(mixed, axis=1)


def _far(
    attend: Callable[..., Array],
    query: Array,
    segments: Array,
    keys: _Keys,
    *,
    mask: AttentionMask,
    first: Array,
) -> Array:
    """Queries that begin at index `first` of the row, against all its keys."""
    after = first + query.shape[1]
    length = keys.arrays[2].shape[1]
    turned = keys.map(lambda x: jnp.roll(x, -after, axis=1))
    return _at_end(
        attend, query, segments, turned.hidden_where(jnp.arange(length) < length - after), mask=mask
    )


def _at_end(
    attend: Callable[..., Array], query: Array, segments: Array, keys: _Keys, *, mask: AttentionMask
) -> Array:
    key, value, key_segments = keys.arrays
    offset = key.shape[1] - query.shape[1]
    own: Any = replace(mask, query_offset=offset, query_segments=segments, key_segments=key_segments)
    return attend(query, key, value, mask=own)
