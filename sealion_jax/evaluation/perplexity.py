"""Log-probabilities of documents, and what follows from them: loss, perplexity, bits per byte.

Bits per byte is what compares across tokenizers and scripts: the summed nats of all text tokens after
`<bos>`, `<eos>` left out, over ln 2 times the raw UTF-8 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.evaluation.documents import Document, Piece, cut, encode, pack, read_documents, to_arrays
from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.objectives.base import LOGITS_BYTES_PER_DEVICE
from sealion_jax.sharding import batch_devices, batch_sharding, process_rows, replicated, to_device
from sealion_jax.tokenizer import Tokenizer
from sealion_kernels import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over one or several documents; nats are of text tokens only."""

    nats: float = 0.0
    eos_nats: float = 0.0
    tokens: int = 0
    """Text tokens: neither `<bos>` nor `<eos>`."""
    num_bytes: int = 0
    documents: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            nats=self.nats + other.nats,
            eos_nats=self.eos_nats + other.eos_nats,
            tokens=self.tokens + other.tokens,
            num_bytes=self.num_bytes + other.num_bytes,
            documents=self.documents + other.documents,
        )

    def metrics(self) -> dict[str, float]:
        """loss (nats a text token), perplexity, bits_per_byte, and the sizes they were taken over."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / (math.log(2) * self.num_bytes),
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A named file of documents, tokenized, cut and packed once."""

    name: str
    documents: Sequence[Document]
    pieces: Sequence[Piece]
    rows: Sequence[Sequence[int]]


def load_sets(config: EvaluationConfig, tokenizer: Tokenizer, *, context: int) -> list[EvaluationSet]:
    """The configured sets, ready to be scored in rows of `context` tokens."""
    sets = []
    for name, path in config.sets.items():
        documents = read_documents(path, limit=config.max_documents)
        tokens = encode(documents, tokenizer)
        pieces = [piece for n, ids in enumerate(tokens) for piece in cut(n, ids, context=context)]
        rows = pack(pieces, row_length=context)
        sets.append(EvaluationSet(name=name, documents=documents, pieces=pieces, rows=rows))
    return sets


class Scorer:
    """Scores sets with a model on a mesh; compiled once and used for every evaluation."""

    def __init__(
        self, bind: Callable[[Any], Gemma3], mesh: Mesh, *, batch_size: int, row_length: int, eos_id: int
    ) -> None:
        devices = batch_devices(mesh)
        self.batch_size = -(-batch_size // devices) * devices
        self._row_length = row_length
        self._eos_id = eos_id
        self._sharding = batch_sharding(mesh)
        self._rows = process_rows(self._sharding, self.batch_size)

        def log_probs(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            model = bind(params)
            hidden = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
            return linear_cross_entropy(
                hidden, model.embedding, batch["targets"], chunk_bytes=LOGITS_BYTES_PER_DEVICE * devices
            )

        self._log_probs = jax.jit(log_probs, out_shardings=replicated(mesh))

    def score(
        self,
        params: Any,
        evaluation_set: EvaluationSet,
        *,
        on_rows: Callable[[int], None] = lambda count: None,
    ) -> list[Score]:
        """The score of each document of the set; `on_rows` is told how many more rows are done."""
        nats = np.zeros(len(evaluation_set.documents))
        eos_nats = np.zeros(len(evaluation_set.documents))
        tokens = np.zeros(len(evaluation_set.documents), np.int64)
        for rows, log_probs in self._batches(params, evaluation_set):
            for row, row_log_probs in zip(rows, log_probs, strict=False):
                start = 0
                for number in row:
                    piece = evaluation_set.pieces[number]
                    scored = slice(piece.num_context, None)
                    piece_nats = -row_log_probs[start : start + len(piece.tokens)][scored].astype(np.float64)
                    is_eos = piece.targets[scored] == self._eos_id
                    nats[piece.document] += piece_nats[~is_eos].sum()
                    eos_nats[piece.document] += piece_nats[is_eos].sum()
                    tokens[piece.document] += (~is_eos).sum()
                    start += len(piece.tokens)
            on_rows(len(rows))
        return [
            Score(
                nats=float(nats[n]),
                eos_nats=float(eos_nats[n]),
                tokens=int(tokens[n]),
                num_bytes=document.num_bytes,
                documents=1,
            )
            for n, document in enumerate(evaluation_set.documents)
        ]

    def _batches(
        self, params: Any, evaluation_set: EvaluationSet
    ) -> Iterator[tuple[Sequence[Sequence[int]], np.ndarray]]:
        for first in range(0, len(evaluation_set.rows), self.batch_size):
            rows = evaluation_set.rows[first : first + self.batch_size]
            padded = [*rows, *([[]] * (self.batch_size - len(rows)))]
            batch = to_arrays(evaluation_set.pieces, padded, row_length=self._row_length)
            local = {name: array[self._rows] for name, array in batch.items()}
            device_batch = to_device(local, self._rows, self._sharding, self.batch_size)
            yield rows, np.asarray(self._log_probs(params, device_batch))


def by_language(documents: Sequence[Document], scores: Sequence[Score]) -> dict[str, Score]:
    """The summed score of each language, in order of appearance."""
    sums: dict[str, Score] = {}
    for document, score in zip(documents, scores, strict=True):
        sums[document.language] = sums.get(document.language, Score()) + score
    return sums


def evaluate_sets(scorer: Scorer, params: Any, sets: Sequence[EvaluationSet]) -> dict[str, float]:
    """`eval/<set>/<metric>` of every set, and `eval/<set>:<language>/<metric>` where a set has several."""
    numbers: dict[str, float] = {}
    for one in sets:
        scores = scorer.score(params, one)
        languages = by_language(one.documents, scores)
        groups = {one.name: sum(scores, Score())}
        if len(languages) > 1:
            groups |= {f"{one.name}:{language}": score for language, score in languages.items()}
        for group, score in groups.items():
            numbers |= {f"eval/{group}/{metric}": value for metric, value in score.metrics().items()}
    return numbers
