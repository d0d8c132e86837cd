"""Which slot holds what, against a list that is kept by hand, and what a cache weighs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.generation.cache import KeysValues, appended, cache_bytes, kept, num_slots, slot_positions
from sealion_jax.layout import Layout
from sealion_jax.model import config as sizes

DOCS = Path(__file__).parents[2] / "docs" / "generation.md"
T = 9


def held_by_hand(length: int, slots: int) -> list[int]:
    """The position in each slot after tokens were put in one by one; -1 for none."""
    held = [-1] * slots
    for position in range(length):
        held[position % slots] = position
    return held


@pytest.mark.parametrize("slots", [1, 4, 9, 12])
def test_slots_hold_the_newest_positions(slots: int) -> None:
    lengths = np.arange(1, T + 1)
    held = np.asarray(slot_positions(jnp.asarray(lengths), slots))
    expected = [held_by_hand(length, slots) for length in lengths]
    np.testing.assert_array_equal(np.where(held < 0, -1, held), expected)


@pytest.mark.parametrize("slots", [1, 4, 9, 12])
def test_a_prompt_and_the_tokens_after_it_lie_where_they_are_looked_for(slots: int) -> None:
    """Keys are their own positions, values their negatives; rows of 3 and of 9 tokens, then two more each."""
    lengths = jnp.array([3, T])
    own = jnp.broadcast_to(jnp.arange(T, dtype=jnp.float32)[None, :, None, None], (2, T, 1, 2))
    cache = kept(own, -own, lengths, slots=slots)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 100]), cache)
    memory = {"blocks": [stacked], "rest": [cache]}
    for step in range(3):
        for row, length in enumerate((3 + step, T + step)):
            held = np.array(held_by_hand(length, slots))
            there = held >= 0
            keys, values = (np.asarray(leaf)[row, :, 0, 0] for leaf in memory["rest"][0])
            np.testing.assert_array_equal(keys[there], held[there])
            np.testing.assert_array_equal(values[there], -held[there])
            np.testing.assert_array_equal(
                np.asarray(memory["blocks"][0].keys)[1, row, :, 0, 1][there], held[there] + 100
            )
        positions = lengths + step
        token = jnp.broadcast_to(positions[:, None, None, None].astype(jnp.float32), (2, 1, 1, 2))
        new = {
            "blocks": [KeysValues(*(jnp.stack([x, x + 100]) for x in (token, -token)))],
            "rest": [KeysValues(token, -token)],
        }
        memory = appended(memory, new, positions, layout=Layout())


def test_a_local_layer_has_no_more_slots_than_its_window() -> None:
    assert [num_slots(1024, capacity) for capacity in (512, 1024, 131_072)] == [512, 1024, 1024]
    assert num_slots(None, 131_072) == 131_072


def table_of_the_docs() -> dict[str, list[str]]:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith(("| 1B", "| 4B", "| 27B"))]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize("size", ["1b", "4b", "27b"])
def test_the_table_of_the_docs_is_what_the_function_gives(size: str) -> None:
    """Bytes are counted anew: keys and values, two bytes each, local layers up to their window."""
    config = getattr(sizes, f"gemma3_{size}")()
    window = config.sliding_window_tokens
    local = sum(not config.is_global(layer) for layer in range(config.num_layers))
    per_layer = 2 * 2 * config.num_kv_heads * config.head_dim
    for tokens in (1, window, window + 1, 32_768):
        slots = local * min(tokens, window) + (config.num_layers - local) * tokens
        assert cache_bytes(config, tokens) == slots * per_layer
    assert cache_bytes(config, 5, jnp.float32) == 2 * cache_bytes(config, 5)
    within = cache_bytes(config, 1)
    beyond = cache_bytes(config, window + 1) - cache_bytes(config, window)
    whole = [f"{cache_bytes(config, tokens) / 2**20:,.0f}" for tokens in (8192, 32_768)]
    assert table_of_the_docs()[size.upper()][:4] == [f"{within:,}", f"{beyond:,}", *whole]
