"""How queries meet keys while generating: over a prompt, and from a new token to a cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sealion_jax.generation.cache import KeysValues, kept, num_slots, slot_positions
from sealion_jax.model.layers import Attend, Context, attend_in_rows

CACHE_AXES = ("batch", "tokens", "kv_heads", "head_dim")


def over_prompts(lengths: Int[Array, " B"], *, capacity: int) -> Attend:
    """Attention as in training; keeps what a cache for `capacity` tokens holds of each row's `lengths`."""

    def attend(
        query: Array,
        key: Array,
        value: Array,
        *,
        window: int | None,
        scale: float,
        context: Context,
        memory: Any,
    ) -> tuple[Array, KeysValues]:
        mixed, _ = attend_in_rows(
            query, key, value, window=window, scale=scale, context=context, memory=memory
        )
        cache = kept(key, value, lengths, slots=num_slots(window, capacity))
        return mixed, KeysValues(*(context.layout.activation(leaf, CACHE_AXES) for leaf in cache))

    return attend


def over_cache(positions: Int[Array, " B"]) -> Attend:
    """Attention of one new token a row, at `positions`, to the cache and itself; gives its own key and value.

    The cache is only read: the new tokens of all layers are added at once, afterwards.
    """

    def attend(
        query: Array,
        key: Array,
        value: Array,
        *,
        window: int | None,
        scale: float,
        context: Context,
        memory: Any,
    ) -> tuple[Array, KeysValues]:
        own = KeysValues(key, value)
        return attend_to_cache(query, own, memory, positions=positions, window=window, scale=scale), own

    return attend


def attend_to_cache(
    query: Float[Array, "B 1 N H"],
    own: KeysValues,
    cache: KeysValues,
    *,
    positions: Int[Array, " B"],
    window: int | None,
    scale: float,
) -> Float[Array, "B 1 N H"]:
    """Values mixed for a token at `positions` of each row, over the slots that it sees and its own.

    Scores and softmax are float32, as in `flash_attention`.

    Args:
        own: of the token itself, [B, 1, K, H].
        cache: of the tokens before it, [B, S, K, H], as `cache.slot_positions` lays them out.
    """
    B, _, N, H = query.shape
    K = own.keys.shape[2]
    grouped = query.reshape(B, K, N // K, H)
    held = slot_positions(positions, cache.keys.shape[1])
    seen = held >= 0
    if window is not None:
        seen &= positions[:, None] - held < window
    scores = jnp.einsum("BKGH,BSKH->BKGS", grouped, cache.keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    own_score = jnp.einsum("BKGH,BTKH->BKGT", grouped, own.keys, preferred_element_type=jnp.float32) * scale
    # A token sees itself, so this is finite.
    top = jnp.maximum(scores.max(-1, keepdims=True), own_score)
    weights, own_weight = jnp.exp(scores - top), jnp.exp(own_score - top)
    total = weights.sum(-1, keepdims=True) + own_weight
    mixed = _mix(weights / total, cache.values) + _mix(own_weight / total, own.values)
    return mixed.reshape(B, 1, N, H).astype(query.dtype)


def _mix(weights: Float[Array, "B K G S"], values: Float[Array, "B S K H"]) -> Float[Array, "B K G H"]:
    return jnp.einsum(
        "BKGS,BSKH->BKGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
