r"""Rows of whole conversations, for instruction tuning and for preferences: best fit, none ever split.

A conversation of n tokens takes n - 1 positions, each of which predicts the next token. T = 12, a chat of 8
tokens and one of 5 (^ is <bos>, h and e the rest of the turns' frames, u the user's words, a the assistant's
with their <end_of_turn>):

    tokens        ^  h  u  h  a1 a2 a3 | ^  h  u  a1 .
    targets       h  u  h  a1 a2 a3 e  | h  u  a1 a2 .
    loss_mask     0  0  0  1  1  1  0  | 0  0  1  1  .        learn = "assistant"
    segment_ids   1  1  1  1  1  1  1  | 2  2  2  2  0
    positions     0  1  2  3  4  5  6  | 0  1  2  3  0

An example is one conversation, or a pair's two, which share a row: `places` of a row then name the segments
of each pair (see objectives/preference.py). One that is too long for a row is left out, or cut from the left:
then it is <bos> and its last tokens, as many as fit; a pair loses the same part of its prompt on both sides,
never any of an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from sealion_jax.data.chat.rendering import Learn
from sealion_jax.data.packing.best_fit import best_fit
from sealion_jax.data.packing.rows import PAD_ID, Row, Span
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.errors import UserError

TooLong = Literal["drop", "truncate_left"]
"""What becomes of an example that is longer than a row."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """How rows are made of stores of chats and pairs."""

    learn: Learn = "assistant"
    """What is learned of a chat: all of the assistant's turns, its last one, or everything that is said. Of a
    pair it is always the answers."""
    too_long: TooLong = "drop"
    """Leave examples out that are longer than a row, or cut them from the left."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Examples of a source that rows do not have whole, by language."""

    too_long: dict[str, int]
    """Left out because they are longer than a row."""
    nothing_to_learn: dict[str, int]
    """Left out because nothing to be learned is left of them after the cut."""
    truncated: dict[str, int]
    """In the rows, without their beginning."""


class PackedExamples(grain.MapDataset[Row]):
    """The rows of a store of chats or pairs. Random access; threads may share it.

    All is computed from three small arrays of the store when it is opened; a row reads its own tokens alone.
    """

    def __init__(
        self, store: TokenStore, sequence_length_tokens: int, config: ExamplesConfig | None = None
    ) -> None:
        """
        Raises:
            UserError: no example of the store fits a row.
        """
        super().__init__()
        self.store = store
        self.sequence_length_tokens = sequence_length_tokens
        self.config = config or ExamplesConfig()
        self.group = 2 if store.kind == "pairs" else 1
        """Documents of an example."""
        self._cut, kept = self._choose()
        lengths = self._positions(self._cut).reshape(-1, self.group).sum(axis=1)
        self._kept = np.flatnonzero(kept)
        if not len(self._kept):
            raise UserError(
                f"none of the {len(kept):,} {self.unit} of {store.path} can be used in rows of "
                f"{sequence_length_tokens} tokens (the shortest has {lengths.min() if len(lengths) else 0}); "
                'raise sequence_length_tokens, or set data.examples.too_long to "truncate_left"'
            )
        self._packing = best_fit(lengths[self._kept], capacity=sequence_length_tokens)
        self.num_positions = int(lengths[self._kept].sum())
        """Positions of all rows that are no padding."""
        self.places = int(np.diff(self._packing.bounds).max())
        """Of a row: how many pairs it may name."""
        self.references: Float32[np.ndarray, " documents"] | None = None
        """Log-probability of each answer under the reference, where there is one."""

    @property
    def unit(self) -> str:
        """What the examples are called."""
        return "pairs" if self.group == 2 else "chats"

    @property
    def unique_tokens(self) -> int:
        """The tokens of text that would fill as many rows: examples that are left out count for nothing."""
        return len(self) * (self.sequence_length_tokens - 1)

    @property
    def num_examples(self) -> int:
        """Examples in the rows."""
        return len(self._kept)

    def with_pairs(
        self, *, places: int | None = None, references: Float32[np.ndarray, " documents"] | None = None
    ) -> PackedExamples:
        """The same rows with room for so many pairs in each, and with the reference's log-probabilities."""
        other = copy.copy(self)
        other.places = places or self.places
        other.references = self.references if references is None else references
        return other

    def __len__(self) -> int:
        return len(self._packing)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self.row(index % len(self))

    def row(self, window: int) -> Row:
        """Tokens, targets and masks of a row; of pairs also the places of their segments, and references."""
        length = self.sequence_length_tokens
        row: Row = {
            name: np.full(length, PAD_ID if name == "tokens" else 0, np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        }
        row["loss_mask"] = np.zeros(length, np.float32)
        documents = self.documents(window)
        start = 0
        for segment, document in enumerate(documents.tolist(), start=1):
            ids, learned = self._tokens(document)
            stop = start + len(ids) - 1
            row["tokens"][start:stop] = ids[:-1]
            row["targets"][start:stop] = ids[1:]
            row["loss_mask"][start:stop] = learned[1:]
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = np.arange(stop - start)
            start = stop
        return {**row, **self._pairs(documents)} if self.group == 2 else row

    def spans(self, window: int) -> tuple[Span, ...]:
        """The conversations in a row, in order: no token is read."""
        spans, position = [], 0
        for segment, document in enumerate(self.documents(window).tolist(), start=1):
            begin, end = self.store.offsets[document : document + 2].tolist()
            cut = int(self._cut[document])
            # The last token is predicted, and predicts nothing: it has no position.
            positions = end - begin - cut - 1
            spans.append(
                Span(
                    document=document,
                    language=self.store.language_names[int(self.store.languages[document])],
                    start=cut,
                    stop=end - begin - 1,
                    document_tokens=end - begin - 1,
                    segment=segment,
                    row_start=position,
                    row_stop=position + positions,
                )
            )
            position += positions
        return tuple(spans)

    def documents(self, window: int) -> Int64[np.ndarray, " segments"]:
        """The store's documents that are a row's segments, in order; a pair's chosen answer comes first."""
        if not 0 <= window < len(self):
            raise IndexError(f"row {window} of {len(self)}")
        examples = self._kept[self._packing.row(window)]
        return (examples[:, None] * self.group + np.arange(self.group)).reshape(-1)

    def left_out(self) -> LeftOut:
        """How many examples are not in the rows, or not whole."""
        used, cut = self._used(), self._cut[:: self.group] > 0
        return LeftOut(
            too_long=self._by_language(~used & ~cut),
            nothing_to_learn=self._by_language(~used & cut),
            truncated=self._by_language(used & cut),
        )

    def left_out_documents(self) -> Iterator[tuple[str, int]]:
        """("too_long" or "nothing_to_learn", number of its first document) of each example in no row."""
        for document in (np.flatnonzero(~self._used()) * self.group).tolist():
            yield "nothing_to_learn" if self._cut[document] > 0 else "too_long", document

    def _used(self) -> Bool[np.ndarray, " examples"]:
        """Which of the store's examples are in the rows."""
        used = np.zeros(self.store.num_documents // self.group, bool)
        used[self._kept] = True
        return used

    def _choose(self) -> tuple[Int64[np.ndarray, " documents"], Bool[np.ndarray, " examples"]]:
        """Tokens cut from the left of each document behind its <bos>, and which examples are in the rows."""
        T, store, group = self.sequence_length_tokens, self.store, self.group
        over = np.maximum(self._positions(0).reshape(-1, group).sum(axis=1) - T, 0)
        if self.config.too_long == "drop":
            return np.zeros(store.num_documents, np.int64), over == 0
        # Both sides of a pair lose the same, so that they still share their prompt.
        cut = np.repeat(-(-over // group), group)
        if group == 2:
            # Of the prompt alone; the turn that opens the answer is not told from it, so a token is kept.
            fits = cut < store.learned_start - 1
        elif self.config.learn == "everything":
            fits = np.ones(store.num_documents, bool)
        else:
            fits = store.learned_stop - 1 > cut
        return cut, np.logical_and.reduce(fits.reshape(-1, group), axis=1)

    def _positions(self, cut: Int64[np.ndarray, " documents"] | int) -> Int64[np.ndarray, " documents"]:
        """Positions that each document takes in a row."""
        return np.diff(self.store.offsets) - 1 - cut

    def _tokens(self, document: int) -> tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Ids of a document after the cut, and which of them are learned."""
        ids, learned = self.store.document_with_mask(document)
        if cut := int(self._cut[document]):
            ids = np.concatenate((ids[:1], ids[cut + 1 :]))
            learned = np.concatenate((learned[:1], learned[cut + 1 :]))
        if self.group == 1 and self.config.learn == "everything":
            learned = np.ones(len(ids), bool)
        elif self.group == 1 and self.config.learn == "last_assistant":
            last = int(np.flatnonzero(learned)[-1])
            learned[: int(np.flatnonzero(~learned[:last])[-1]) + 1] = False
        return ids, learned

    def _pairs(self, documents: Int64[np.ndarray, " segments"]) -> Row:
        """The fields of a row of pairs: segments 2k + 1 and 2k + 2 are pair k's."""
        pairs = len(documents) // 2
        row: Row = {}
        for side, name in enumerate(("chosen", "rejected")):
            segments = np.zeros(self.places, np.int32)
            segments[:pairs] = np.arange(pairs) * 2 + 1 + side
            row[f"{name}_segment"] = segments
            if self.references is not None:
                values = np.zeros(self.places, np.float32)
                values[:pairs] = self.references[documents[side::2]]
                row[f"reference_{name}"] = values
        return row

    def _by_language(self, examples: Bool[np.ndarray, " examples"]) -> dict[str, int]:
        languages = self.store.languages[:: self.group][examples]
        counts = np.bincount(languages, minlength=len(self.store.language_names)).tolist()
        return {name: n for name, n in zip(self.store.language_names, counts, strict=True) if n}
