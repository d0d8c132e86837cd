"""When the sources of a mixture may and must give their elements, and an order in which all of them can.

The building blocks of schedule.py, whose first lines say what they are for and why they always succeed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np


class Pace:
    """When one source's units may and must be given in a stage, all in whole numbers.

    `off` is by how many elements the source was ahead (behind, where negative) of the sum of its quotas when
    the stage began; 0 keeps promise 1 alone.
    """

    def __init__(self, weight: Fraction, off: Fraction = Fraction(0)) -> None:
        ahead, behind = max(off, Fraction(0)), max(-off, Fraction(0))
        unit = math.lcm(ahead.denominator, behind.denominator)
        self._per_unit = unit * weight.denominator
        self._per_slot = unit * weight.numerator
        # All in whole numbers, so one less means that the sum may be off by exactly 1, and no more.
        self._delay = max(int(ahead * unit) * weight.denominator - 1, 0)
        self._advance = max(int(behind * unit) * weight.denominator - 1, 0)

    def release(self, unit: int) -> int:
        """The first slot that unit 1, 2, ... may take."""
        return ((unit - 1) * self._per_unit + self._delay) // self._per_slot

    def deadline(self, unit: int) -> int:
        """The last slot that it may take."""
        return (unit * self._per_unit - self._advance - 1) // self._per_slot

    def least(self, slots: int) -> int:
        """Units that must have been given after so many slots."""
        return (slots * self._per_slot + self._advance) // self._per_unit

    def most(self, slots: int) -> int:
        """Units that may have been given after so many slots."""
        return -((self._delay - slots * self._per_slot) // self._per_unit)


Paces = dict[int, Pace]
"""Of the sources that take part in a stage, by number."""


def anchor(
    slots: int,
    paces: Paces,
    *,
    look_ahead: int,
    urgency: Callable[[int, int], object] | None = None,
) -> dict[int, int] | None:
    """Counts after so many slots from which, and to which, units can be arranged; None where there are none.

    Args:
        look_ahead: slots after the anchor in which the units that fall due are checked.
        urgency: (source, its least count) -> sort key of who is rounded up first; None: by next deadline.
    """
    counts = {source: pace.least(slots) for source, pace in paces.items()}
    missing = slots - sum(counts.values())
    choices = [source for source, pace in paces.items() if pace.most(slots) > counts[source]]
    if not 0 <= missing <= len(choices):
        return None
    since_release = {source: slots - paces[source].release(counts[source] + 1) for source in choices}
    room = _room(slots, paces, counts, look_back=max(since_release.values(), default=0))
    order = urgency or (lambda source, count: paces[source].deadline(count + 1))
    for source in sorted(choices, key=lambda source: (order(source, counts[source]), source)):
        later = room[since_release[source] :]
        if missing and later.min() > 0:
            later -= 1
            counts[source] += 1
            missing -= 1
    if missing or not _can_go_on(slots, paces, counts, look_ahead=look_ahead):
        return None
    return counts


def _room(slots: int, paces: Paces, counts: dict[int, int], *, look_back: int) -> np.ndarray:
    """[t] -> how many more units, released within the last t slots, those slots can hold."""
    taken = np.zeros(look_back + 1, np.int64)
    for source, pace in paces.items():
        unit = counts[source]
        while unit > 0 and (since := slots - pace.release(unit)) <= look_back:
            taken[since] += 1
            unit -= 1
    return np.arange(look_back + 1) - np.cumsum(taken)


def _can_go_on(slots: int, paces: Paces, counts: dict[int, int], *, look_ahead: int) -> bool:
    """Whether in no first t slots from here more than t units fall due."""
    due = np.zeros(look_ahead + 1, np.int64)
    for source, pace in paces.items():
        unit = counts[source] + 1
        while (within := pace.deadline(unit) + 1 - slots) <= look_ahead:
            due[within] += 1
            unit += 1
    return bool(np.all(np.cumsum(due) <= np.arange(look_ahead + 1)))


def arrange(
    begin: int, first: dict[int, int], end: int, last: dict[int, int], paces: Paces
) -> np.ndarray | None:
    """The source of each slot in [begin, end), earliest deadline first; None where a unit misses its window.

    `first` and `last` are the sources' counts at both ends.
    """
    waiting = [(paces[s].release(first[s] + 1), s) for s in paces if last[s] > first[s]]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    counts = dict(first)
    chosen = np.empty(end - begin, np.int16)
    for slot in range(begin, end):
        while waiting and waiting[0][0] <= slot:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (paces[source].deadline(counts[source] + 1), source))
        if not ready or ready[0][0] < slot:
            return None
        source = heapq.heappop(ready)[1]
        chosen[slot - begin] = source
        counts[source] += 1
        if counts[source] < last[source]:
            heapq.heappush(waiting, (paces[source].release(counts[source] + 1), source))
    return chosen
