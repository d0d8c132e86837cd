"""Global batches: what every step trains on, as a pure function of (mixture, step, skipped ranges)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from sealion_jax.data.files import is_remote
from sealion_jax.data.mixture import Mixture
from sealion_jax.data.packing.rows import Row, Span
from sealion_jax.errors import UserError

Skip = tuple[int, int]
"""(first batch, how many): batch numbers that no step trains on."""


@dataclass(frozen=True, kw_only=True)
class RowOrigin:
    """Where a row of a batch comes from."""

    source: str
    store: str
    epoch: int
    window: int
    windows: int
    """Windows of an epoch of the source."""
    spans: tuple[Span, ...]


class GlobalBatches:
    """The rows of each step, any of them, in any order; threads may share it.

    Step s, counted from 0, trains on batch b(s), the s-th batch number that is not skipped, and batch b is
    elements [b * B, (b + 1) * B) of the mixture. Nothing depends on which process asks for which rows.
    """

    def __init__(self, mixture: Mixture, *, global_batch_size: int, skips: Sequence[Skip] = ()) -> None:
        """
        Raises:
            UserError: skipped ranges overlap, are out of order or empty.
            ValueError: the mixture was built for another batch size, so its stages would start elsewhere.
        """
        if global_batch_size != mixture.global_batch_size:
            raise ValueError(
                f"global batch of {global_batch_size} rows over a mixture for {mixture.global_batch_size}"
            )
        self.mixture = mixture
        self.global_batch_size = global_batch_size
        self.skips = tuple((int(first), int(count)) for first, count in skips)
        end = 0
        for first, count in self.skips:
            if count < 1 or first < end:
                raise UserError(
                    f"skipped ranges of batches {list(self.skips)} must be (first, count) in order, apart, "
                    "with a count of at least 1"
                )
            end = first + count

    def batch_number(self, step: int) -> int:
        """The batch that a step trains on."""
        number = step
        for first, count in self.skips:
            if number < first:
                break
            number += count
        return number

    def with_skip(self, step: int, count: int) -> GlobalBatches:
        """The same, but the batches that steps [step, step + count) would have trained on are left out."""
        numbers = {self.batch_number(step + i) for i in range(count)}
        numbers |= {first + i for first, length in self.skips for i in range(length)}
        skips: list[Skip] = []
        for number in sorted(numbers):
            if skips and sum(skips[-1]) == number:
                skips[-1] = (skips[-1][0], skips[-1][1] + 1)
            else:
                skips.append((number, 1))
        return GlobalBatches(self.mixture, global_batch_size=self.global_batch_size, skips=skips)

    def rows(self, step: int, rows: Sequence[int]) -> Row:
        """The given rows of a step's batch, in the given order: arrays of [rows, T], `source` of [rows]."""
        elements = [self.mixture.row(self._element(step, row)) for row in rows]
        return {name: np.stack([element[name] for element in elements]) for name in elements[0]}

    def iterate(
        self,
        start_step: int,
        rows: Sequence[int],
        *,
        prefetch: int = 8,
        threads: int | None = None,
    ) -> Iterator[tuple[int, Row]]:
        """(step, those rows) of every step from `start_step` on, without end.

        Args:
            prefetch: batches held ready; 0 reads each when it is asked for.
            threads: threads that read, at most one a batch held ready; 2 where None, and 16 where a store is
                remote, since they then mostly wait.
        """
        rows = tuple(rows)
        if threads is None:
            threads = 16 if any(is_remote(w.store.path) for w in self.mixture.sources) else 2
        steps = grain.MapDataset.range(start_step, np.iinfo(np.int64).max)
        options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
        iterator = iter(steps.map(lambda step: (step, self.rows(step, rows))).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            # Older Grain stops its threads when the iterator is collected, newer when it is closed.
            getattr(iterator, "close", lambda: None)()

    def documents(self, step: int, row: int) -> RowOrigin:
        """Where a row comes from, from offsets alone: no token is read."""
        place = self.mixture.locate(self._element(step, row))
        windows = self.mixture.sources[place.source]
        return RowOrigin(
            source=self.mixture.names[place.source],
            store=windows.store.path,
            epoch=place.epoch,
            window=place.window,
            windows=len(windows),
            spans=windows.spans(place.window),
        )

    def describe(self, step: int, *, most: int = 20) -> str:
        """A step's batch in words: per source, its documents, the first `most` of them by number."""
        by_source: dict[str, list[int]] = {}
        for row in range(self.global_batch_size):
            origin = self.documents(step, row)
            by_source.setdefault(f"{origin.source} ({origin.store})", []).extend(
                span.document for span in origin.spans
            )
        lines = [f"batch {self.batch_number(step)}, {self.global_batch_size} rows"]
        for source, documents in by_source.items():
            unique = list(dict.fromkeys(documents))
            more = f" and {len(unique) - most} more" if len(unique) > most else ""
            lines.append(f"  {source}: documents {', '.join(map(str, unique[:most]))}{more}")
        return "\n".join(lines)

    def digest(self, step: int) -> str:
        """A hash of which documents, and which tokens of them, a step's whole batch holds, in order.

        The same in every process, and on any number of them; costs no reading of tokens.
        """
        digest = hashlib.sha256()
        for row in range(self.global_batch_size):
            origin = self.documents(step, row)
            parts = [(span.document, span.start, span.stop) for span in origin.spans]
            digest.update(repr((origin.source, parts)).encode())
        return digest.hexdigest()

    def _element(self, step: int, row: int) -> int:
        if step < 0 or not 0 <= row < self.global_batch_size:
            raise IndexError(f"row {row} of step {step}: a batch has {self.global_batch_size} rows")
        return self.batch_number(step) * self.global_batch_size + row


def batch_digest(batch: Row) -> str:
    """A hash of a batch's arrays: names, types, shapes and every value."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
