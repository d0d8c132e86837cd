"""Best-fit packing: against a walk over all rows, and its promises on any lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealion_jax.data.packing.best_fit import best_fit


def walk(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit by looking at every row for every item; of rows with equal room, the one filled last."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    touched: list[int] = []
    for clock, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [r for r, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            row = min(fitting, key=lambda r: (rooms[r], -touched[r]))
        else:
            row = len(rows)
            rows.append([])
            rooms.append(capacity)
            touched.append(0)
        rows[row].append(item)
        rooms[row] -= lengths[item]
        touched[row] = clock
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80))
def test_it_is_best_fit_longest_first(lengths: list[int]):
    packing = best_fit(np.array(lengths, np.int64), capacity=30)
    assert [packing.row(r).tolist() for r in range(len(packing))] == walk(lengths, 30)


def test_lengths_as_chats_have_them_leave_hardly_any_room():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 20_000), 8, 4096).astype(np.int64)
    packing = best_fit(lengths, capacity=4096)
    used = np.add.reduceat(lengths[packing.order], packing.bounds[:-1])
    assert used.max() <= 4096 and sorted(packing.order.tolist()) == list(range(20_000))
    assert lengths.sum() / (len(packing) * 4096) > 0.999


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_an_item_that_fits_no_row_is_refused(lengths: list[int]):
    with pytest.raises(ValueError, match="leave them out"):
        best_fit(np.array(lengths), capacity=10)


def test_nothing_makes_no_rows():
    assert len(best_fit(np.zeros(0, np.int64), capacity=10)) == 0
