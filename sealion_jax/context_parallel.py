"""Attention of rows whose tokens are split over devices: each device's queries against all keys they may see.

Each of C devices holds a run of T / C tokens of every row. A local layer needs the window - 1 keys before
its first query, so they are fetched from the devices before it and put in front of its own: the queries are
at the end of those keys, wherever in the row the run is. On a global layer keys go round (see `ring`);
where runs have no halves, or all scores are to be kept, all keys before the run are fetched too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sealion_jax.ring import ring_attention
from sealion_kernels import AttentionMask, flash_attention

UNSEEN = jnp.iinfo(jnp.int32).min
"""The segment of keys that are not there for any query."""


def attend_over_context(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    *,
    mask: AttentionMask,
    axis: str,
    **options: Any,
) -> Float[Array, "B t N H"]:
    """The mixed values of this device's tokens; to be called under `shard_map`.

    Args:
        mask: of whole rows, its arrays those of this device's tokens.
        axis: the mesh axis that splits the tokens.
        options: of `flash_attention`: scale, implementation, target.

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
    if mask.window is None and here % 2 == 0 and options.get("implementation") != "dense":
        return ring_attention(query, key, value, segments, axis=axis, **options)
    everything = here * (devices - 1)
    back = everything if mask.window is None else min(mask.window - 1, everything)
    return _near(query, (key, value, segments), mask=mask, axis=axis, back=back, **options)


def _near(
    query: Array, own: tuple[Array, ...], *, mask: AttentionMask, axis: str, back: int, **options: Any
) -> Array:
    """Against the device's own keys, values and segments, and `back` of those before them."""
    here = query.shape[1]
    whole, rest = divmod(back, here)
    pieces = [_from_before(tuple(x[:, here - rest :] for x in own), axis, whole + 1)] if rest else []
    pieces += [_from_before(own, axis, distance) for distance in range(whole, 0, -1)]
    pieces.append(own)
    key, value, segments = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    # What came round from the end of the row is before its beginning.
    index = jax.lax.axis_index(axis) * here - back + jnp.arange(back + here)
    seen = replace(
        mask,
        query_offset=back,
        query_segments=own[2],
        key_segments=jnp.where(index < 0, UNSEEN, segments),
    )
    return flash_attention(query, key, value, mask=seen, **options)


def _from_before(arrays: tuple[Array, ...], axis: str, distance: int) -> tuple[Array, ...]:
    """The same piece of the device `distance` places before this one; of the first ones', from the end."""
    devices = jax.lax.axis_size(axis)
    moves = [(c, (c + distance) % devices) for c in range(devices)]
    return tuple(jax.lax.ppermute(x, axis, moves) for x in arrays)
