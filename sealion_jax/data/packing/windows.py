"""Rows cut from a store of texts, for continued pre-training.

Continued pre-training concatenates documents (each `<bos> text <eos>` in the store) and cuts. A window of T
positions moves on by T - 1 tokens of the store, so that a window that begins inside a document has room for
the `<bos>` that Gemma needs there. T = 6, documents A of 7 and B of 5 tokens (^ is <bos>, $ is <eos>):

    store        ^  a1 a2 a3 a4 a5 $  ^  b1 b2 b3 $
    window 0     ^  a1 a2 a3 a4 .                        begins with A's own <bos>: the last slot is padding
      targets    a1 a2 a3 a4 a5 .
      loss       1  1  1  1  1  0
      segments   1  1  1  1  1  0
      positions  0  1  2  3  4  0
    window 1     ^  a5 $  ^  b1 b2                       begins inside A: <bos> inserted
      targets    a5 $  ^  b1 b2 b3
      loss       0  1  0  1  1  1                        inserted <bos>: a5 was predicted in window 0, with
      segments   1  1  1  2  2  2                        its real context; $: its target is another document's
      positions  0  1  2  0  1  2
    window 2     ^  b3 $  .  .  .                        the store ends: padding
      loss       0  1  0  0  0  0

So every token of text and every <eos> is predicted once per epoch, and no <bos> ever.
"""

from __future__ import annotations

import grain
import numpy as np

from sealion_jax.data.packing.rows import BOS_ID, PAD_ID, Row, Span
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.errors import UserError


class PackedWindows(grain.MapDataset[Row]):
    """The windows of a token store, in its order. Random access; threads may share it."""

    def __init__(self, store: TokenStore, sequence_length_tokens: int) -> None:
        """
        Raises:
            UserError: there is nothing to predict in the store, or its documents do not begin with <bos>.
        """
        super().__init__()
        if sequence_length_tokens < 2:
            raise UserError(
                f"sequence_length_tokens is {sequence_length_tokens}; a row needs at least 2 tokens"
            )
        if store.num_tokens < 2:
            raise UserError(f"token store {store.path} has no documents; prepare it from files with text")
        if store.read(0, 1)[0] != BOS_ID:
            raise UserError(
                f"token store {store.path} begins with token {store.read(0, 1)[0]}, not with Gemma 3's <bos> "
                f"({BOS_ID}); prepare it with a tokenizer of Gemma 3's id layout"
            )
        self.store = store
        self.sequence_length_tokens = sequence_length_tokens
        self._stride = sequence_length_tokens - 1
        # The last token of the store is an <eos>: it is a target, and predicts nothing.
        self._length = -(-(store.num_tokens - 1) // self._stride)

    @property
    def unique_tokens(self) -> int:
        """The store's tokens."""
        return self.store.num_tokens

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self.row(index % self._length)

    def row(self, window: int) -> Row:
        """Tokens, targets and masks of a window."""
        length, store = self.sequence_length_tokens, self.store
        start, stop = self._stream_range(window)
        first, after, starts = self._documents(start, stop)
        inserted = int(store.offsets[first] != start)
        used = inserted + stop - start
        stream = store.read(start, min(stop + 1, store.num_tokens))

        tokens = np.full(length, PAD_ID, np.int32)
        tokens[0] = BOS_ID
        tokens[inserted:used] = stream[: stop - start]
        targets = np.full(length, PAD_ID, np.int32)
        targets[0] = stream[0]
        targets[inserted : inserted + len(stream) - 1] = stream[1:]

        # Where the second and later documents of the row begin.
        begins = starts - start + inserted
        segment_ids = np.zeros(length, np.int32)
        segment_ids[0] = 1
        segment_ids[begins] = 1
        np.cumsum(segment_ids, out=segment_ids)
        segment_ids[used:] = 0
        positions = np.arange(length, dtype=np.int32)
        bounds = np.concatenate(([0], begins, [used]))
        positions[:used] -= np.repeat(bounds[:-1], np.diff(bounds)).astype(np.int32)
        positions[used:] = 0

        loss_mask = np.zeros(length, np.float32)
        loss_mask[inserted:used] = 1
        loss_mask[begins - 1] = 0
        if store.offsets[after] == stop:
            loss_mask[used - 1] = 0
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": loss_mask,
            "segment_ids": segment_ids,
            "positions": positions,
        }

    def spans(self, window: int) -> tuple[Span, ...]:
        """The documents in a window, in order, from the offsets alone: no token is read."""
        start, stop = self._stream_range(window)
        first, after, starts = self._documents(start, stop)
        offsets = self.store.offsets
        inserted = int(offsets[first] != start)
        bounds = [start, *starts.tolist(), stop]
        spans = []
        for segment, document in enumerate(range(first, after), start=1):
            begin, end = bounds[segment - 1], bounds[segment]
            spans.append(
                Span(
                    document=document,
                    language=self.store.language_names[int(self.store.languages[document])],
                    start=begin - int(offsets[document]),
                    stop=end - int(offsets[document]),
                    document_tokens=int(offsets[document + 1] - offsets[document]),
                    segment=segment,
                    row_start=begin - start + inserted if segment > 1 else 0,
                    row_stop=end - start + inserted,
                )
            )
        return tuple(spans)

    def _stream_range(self, window: int) -> tuple[int, int]:
        if not 0 <= window < self._length:
            raise IndexError(f"window {window} of {self._length}")
        start = window * self._stride
        return start, min(start + self._stride, self.store.num_tokens)

    def _documents(self, start: int, stop: int) -> tuple[int, int, np.ndarray]:
        """The document that holds token `start`, the first one that begins at `stop` or later (its number may
        be num_documents), and where those begin that begin inside."""
        offsets = self.store.offsets
        # In whole numbers, the first offset that is not below `stop` is the one after the last below it.
        before, after = np.searchsorted(offsets, (start, stop - 1), side="right").tolist()
        return before - 1, after, offsets[before:after]
