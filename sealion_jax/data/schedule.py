"""Which source gives each element of a mixture: exact shares in stages, found from any element on.

What is promised, with Q(n) = n * weight the exact quota of a source n elements into a stage:

1. In every prefix of every stage, a source has given floor(Q(n)) or ceil(Q(n)) elements. So its count is
   never a whole element off, it is exact wherever the quota is a whole number, and weight 0 is absence.
2. Over all stages together the count stays within one element of the sum of the quotas too, wherever a
   schedule that also keeps 1 is found: a stage starts with what the one before rounded, and its elements are
   placed so that the sum stays within one as well. No proof says that this can always be done (the two
   conditions together are not a network flow); where a block cannot, 1 alone holds in it.

How. Write unit j of a source for its j-th element in the stage. Promise 1 says that unit j takes a slot in
its window [floor((j - 1) / w), ceil(j / w) - 1]:

    w = 0.4      slot      0   1   2   3   4   5   6   7
    unit 1                 [-------]
    unit 2                         [-------]
    unit 3                                     [-------]       (windows of one source may share a slot)

A schedule exists: a source that gives w of every slot puts all of unit j inside its window, and where a
fractional schedule exists, one of whole units does (bipartite matching). Earliest deadline first finds it.

Random access comes from anchors: every `block` slots the counts are fixed without looking at what came
before, so that blocks are arranged one by one. At slot n each source has given floor(Q) or one more; the
choice must leave (forward) no more units due in any first t slots after n than t, and (backward) no more
units released in any last t slots before n than t. Both conditions are about nested sets of sources (by next
deadline, by release), the fractional schedule satisfies both, and sources within the backward bounds are the
independent sets of a laminar matroid; so the greedy choice, by next deadline, that keeps the backward bounds
has as many members of every "due within t" as can be had, and satisfies the forward bounds too. By Hall's
theorem for intervals the units between two anchors can then be arranged, and earliest deadline first does.
Blocks are no shorter than 1 / weight, so that every count grows from one anchor to the next.

Promise 2 narrows the windows of a source by what it was ahead or behind at the start of the stage (`delay`,
`advance` below). The window argument is that of Pfair scheduling: Baruah, Cohen, Plaxton and Varvel,
"Proportionate progress", Algorithmica 15 (1996); that deviations below one are possible for any number of
sources is Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980).
"""

from __future__ import annotations

import bisect
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sealion_jax.data.pacing import Pace, anchor, arrange

SMALLEST_WEIGHT = Fraction(1, 1_000_000)
"""Blocks are as long as 1 / the smallest weight."""

_CACHED_BLOCKS = 16
_BOUNDARY_TRIES = 32
_TRIED_ELEMENTS = 4096


class _Stage:
    """One stage's elements, numbered from 0, arranged block by block."""

    def __init__(
        self, weights: Sequence[Fraction], *, length: int | None, off: Sequence[Fraction], block: int
    ) -> None:
        self.weights = weights
        self.length = length
        self.off = off
        present = [s for s, weight in enumerate(weights) if weight > 0]
        self.plain = {s: Pace(weights[s]) for s in present}
        self.narrow = {s: Pace(weights[s], off[s]) for s in present} if any(off) else self.plain
        self.block = max(block, math.ceil(1 / min(weights[s] for s in present)))
        self.blocks = None if length is None else max(1, length // self.block)
        self.end: dict[int, int] | None = None

    def bounds(self, number: int) -> tuple[int, int]:
        begin = number * self.block
        if self.blocks is not None and number == self.blocks - 1:
            assert self.length is not None
            return begin, self.length
        return begin, begin + self.block

    def counts_at(self, slots: int) -> dict[int, int]:
        """Counts at a boundary of blocks."""
        if slots == 0:
            return dict.fromkeys(self.plain, 0)
        if slots == self.length:
            assert self.end is not None
            return self.end
        # A stage's last block is shorter than two.
        ahead = 2 * self.block if self.length is None else min(2 * self.block, self.length - slots)
        counts = anchor(slots, self.narrow, look_ahead=ahead)
        if counts is None:
            counts = anchor(slots, self.plain, look_ahead=ahead)
        assert counts is not None, "the fractional schedule is a witness that there are such counts"
        return counts

    def arrange(self, number: int) -> tuple[dict[int, int], np.ndarray]:
        """Counts before a block, and the source of each of its elements."""
        begin, end = self.bounds(number)
        first, last = self.counts_at(begin), self.counts_at(end)
        chosen = arrange(begin, first, end, last, self.narrow)
        if chosen is None:
            chosen = arrange(begin, first, end, last, self.plain)
        assert chosen is not None, "Hall's condition holds between two anchors"
        return first, chosen

    def ends(self, attempt: int) -> dict[int, int] | None:
        """Counts at the end of the stage that leave every source within one of its sum; the furthest behind
        is rounded up first, nudged by a fixed pseudo-random amount in later attempts."""
        length = self.length
        assert length is not None

        def urgency(source: int, count: int) -> float:
            behind = self.off[source] + count - length * self.weights[source]
            return float(behind) + _fixed_random(attempt, source) * attempt / (2 * _BOUNDARY_TRIES)

        narrow = anchor(length, self.narrow, look_ahead=0, urgency=urgency)
        return narrow or anchor(length, self.plain, look_ahead=0, urgency=urgency)

    def off_at_end(self) -> list[Fraction]:
        """By how much each source is ahead of the sum of its quotas at the end of the stage."""
        assert self.length is not None and self.end is not None
        return [
            off + self.end.get(source, 0) - self.length * weight
            for source, (off, weight) in enumerate(zip(self.off, self.weights, strict=True))
        ]

    def keeps_sums(self) -> bool:
        """Whether the stage's first elements keep every source within one of its sum."""
        if any(abs(off) >= 1 for off in self.off):
            return False
        end = _TRIED_ELEMENTS if self.length is None else min(_TRIED_ELEMENTS, self.length)
        no_limit = dict.fromkeys(self.plain, end)
        return arrange(0, self.counts_at(0), end, no_limit, self.narrow) is not None


@dataclass(frozen=True)
class _Block:
    begin: int
    before: np.ndarray
    """Each source's elements in the whole schedule before this block."""
    sources: np.ndarray
    ranks: np.ndarray
    """How many elements of its own source come before an element in this block."""


class Schedule:
    """The source of each element of a mixture, and which of that source's elements it is.

    Threads may share it. See the module's first lines for what it promises.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[Fraction]]], *, block: int = 4096) -> None:
        """
        Args:
            stages: (first element, weight of each source); the first begins at 0, each sums to 1, and no
                weight lies between 0 and SMALLEST_WEIGHT.
            block: elements arranged at a time; longer where a weight is smaller than 1 / block.
        """
        self.num_sources = len(stages[0][1])
        self._starts = [start for start, _ in stages]
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._stages: list[_Stage] = []
        self._before = [np.zeros(self.num_sources, np.int64)]
        off = [Fraction(0)] * self.num_sources
        lengths = [b - a for a, b in zip(self._starts, self._starts[1:], strict=False)]
        for number, (_, weights) in enumerate(stages):
            length = lengths[number] if number < len(lengths) else None
            stage = _Stage(list(weights), length=length, off=off, block=block)
            self._stages.append(stage)
            if length is not None:
                following = lengths[number + 1] if number + 1 < len(lengths) else None
                stage.end = _best_end(stage, list(stages[number + 1][1]), length=following, block=block)
                off = stage.off_at_end()
                given = np.array([stage.end.get(s, 0) for s in range(self.num_sources)], np.int64)
                self._before.append(self._before[-1] + given)

    def locate(self, element: int) -> tuple[int, int]:
        """(source, which of that source's elements, from 0) of one element."""
        block = self._block(element)
        place = element - block.begin
        source = int(block.sources[place])
        return source, int(block.before[source]) + int(block.ranks[place])

    def counts(self, elements: int) -> np.ndarray:
        """[sources] how many of the first so many elements each source gives."""
        if elements == 0:
            return np.zeros(self.num_sources, np.int64)
        block = self._block(elements - 1)
        inside = block.sources[: elements - block.begin]
        return block.before + np.bincount(inside, minlength=self.num_sources)

    def quota(self, source: int, elements: int) -> Fraction:
        """The exact share of the first so many elements that a source is meant to give."""
        total = Fraction(0)
        for start, stage in zip(self._starts, self._stages, strict=True):
            inside = elements - start if stage.length is None else min(elements - start, stage.length)
            total += max(inside, 0) * stage.weights[source]
        return total

    def reached(self, source: int, count: int) -> int | None:
        """The element, to within a few, by which a source has given so many; None if it never does."""
        total = Fraction(0)
        for start, stage in zip(self._starts, self._stages, strict=True):
            weight = stage.weights[source]
            if weight > 0 and (stage.length is None or total + stage.length * weight >= count):
                return start + math.ceil((count - total) / weight)
            total += (stage.length or 0) * weight
        return None

    def _block(self, element: int) -> _Block:
        number = bisect.bisect_right(self._starts, element) - 1
        stage = self._stages[number]
        inside = element - self._starts[number]
        in_stage = inside // stage.block
        if stage.blocks is not None:
            in_stage = min(in_stage, stage.blocks - 1)
        key = (number, in_stage)
        with self._lock:
            block = self._cache.get(key)
            if block is None:
                block = self._cache[key] = self._arranged(number, in_stage)
                if len(self._cache) > _CACHED_BLOCKS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return block

    def _arranged(self, number: int, in_stage: int) -> _Block:
        stage = self._stages[number]
        first, chosen = stage.arrange(in_stage)
        before = self._before[number].copy()
        for source, count in first.items():
            before[source] += count
        order = np.argsort(chosen, kind="stable")
        sizes = np.bincount(chosen, minlength=self.num_sources)
        ranks = np.empty(len(chosen), np.int32)
        ranks[order] = np.arange(len(chosen)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return _Block(self._starts[number] + stage.bounds(in_stage)[0], before, chosen, ranks)


def _fixed_random(*numbers: int) -> float:
    """In [0, 1), the same on every machine and with every NumPy."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:6], "big") / 2**48


def _best_end(
    stage: _Stage, next_weights: Sequence[Fraction], *, length: int | None, block: int
) -> dict[int, int]:
    """How to round a stage's last counts: the first way found that lets the next stage keep the sums."""
    fallback = None
    for attempt in range(_BOUNDARY_TRIES):
        stage.end = stage.ends(attempt)
        if stage.end is None:
            continue
        fallback = fallback or stage.end
        following = _Stage(next_weights, length=length, off=stage.off_at_end(), block=block)
        if following.keeps_sums():
            return stage.end
    assert fallback is not None, "the fractional schedule is a witness that there are such counts"
    return fallback
