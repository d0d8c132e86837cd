"""Best-fit decreasing: whole items into as few rows as may be."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class Packing(NamedTuple):
    """Which items are in which row: row r has `order[bounds[r] : bounds[r + 1]]`, its longest item first."""

    order: Int64[np.ndarray, " items"]
    bounds: Int64[np.ndarray, " rows+1"]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> Int64[np.ndarray, " items_of_the_row"]:
        """The items of a row."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]


def best_fit(lengths: Int64[np.ndarray, " items"], *, capacity: int) -> Packing:
    """Each item in the row with the least room that is enough for it, the longest items first.

    Equal lengths keep their order, so the packing is a function of the lengths alone. It needs at most 11/9
    of the fewest possible rows, and four more (Johnson et al. 1974, "Worst-case performance bounds for simple
    one-dimensional packing algorithms"); with lengths as chats have them, hardly one in a thousand more. Rows
    are kept by their room, of which there are at most `capacity`, so the work is little more than sorting.

    Raises:
        ValueError: an item is longer than a row, or has no length.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(
            f"items of {lengths.min()} to {lengths.max()} do not all fit rows of {capacity}; leave them out"
        )
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their room
    rooms: list[int] = []  # those with rows, in order
    num_rows = 0
    for place, length in enumerate(lengths[longest_first].tolist()):
        found = bisect.bisect_left(rooms, length)
        if found < len(rooms):
            room = rooms[found]
            row = waiting[room].pop()
            if not waiting[room]:
                del rooms[found]
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[place] = row
        left = room - length
        if left:
            if not waiting[left]:
                bisect.insort(rooms, left)
            waiting[left].append(row)
    order = longest_first[np.argsort(row_of, kind="stable")]
    counts = np.bincount(row_of, minlength=num_rows) if num_rows else np.zeros(0, np.int64)
    return Packing(order=order, bounds=np.concatenate(([0], np.cumsum(counts))).astype(np.int64))
