"""Log-probabilities of documents, and what follows from them: loss, perplexity, bits per byte, preferences.

Bits per byte is what compares across tokenizers and scripts: the summed nats of all that is scored, over ln 2
times its UTF-8 bytes. Of a text that is every token after `<bos>`, `<eos>` left out, over the raw text. Of a
chat it is the assistant's turns, their `<end_of_turn>`s included, over what the assistant says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.evaluation.documents import Document, read_held_out
from sealion_jax.evaluation.pairs import PairReference, PairScores, pair_metrics
from sealion_jax.evaluation.windows import Piece, cut, pack, to_arrays
from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.sharding import batch_devices, batch_sharding, process_rows, replicated, to_device
from sealion_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over one or several documents; nats are of scored tokens only."""

    nats: float = 0.0
    eos_nats: float = 0.0
    tokens: int = 0
    """Scored tokens: neither `<bos>` nor `<eos>`."""
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
        """loss (nats a scored token), perplexity, bits_per_byte, and the sizes they were taken over."""
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
    kind: StoreKind
    documents: Sequence[Document]
    """Of pairs, document 2k is the chosen conversation of one, 2k + 1 the rejected one."""
    pieces: Sequence[Piece]
    rows: Sequence[Sequence[int]]

    @property
    def examples(self) -> Sequence[Document]:
        """A document for each text, chat or pair, which tells its language and id."""
        return self.documents[::2] if self.kind == "pairs" else self.documents


def load_sets(config: EvaluationConfig, tokenizer: Tokenizer, *, context: int) -> list[EvaluationSet]:
    """The configured sets, ready to be scored in rows of `context` tokens."""
    sets = []
    for name, path in config.sets.items():
        kind, documents = read_held_out(path, tokenizer, limit=config.max_documents)
        pieces = [
            piece
            for n, document in enumerate(documents)
            for piece in cut(n, document.tokens, context=context, scored=document.scored)
        ]
        rows = pack(pieces, row_length=context)
        sets.append(EvaluationSet(name=name, kind=kind, documents=documents, pieces=pieces, rows=rows))
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
            return model.cross_entropy(hidden, batch["targets"]).log_probs

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
                    new = slice(piece.num_context, None)
                    piece_nats = -row_log_probs[start : start + len(piece.tokens)][new].astype(np.float64)
                    is_eos = piece.targets[new] == self._eos_id
                    nats[piece.document] += piece_nats[piece.scored & ~is_eos].sum()
                    eos_nats[piece.document] += piece_nats[piece.scored & is_eos].sum()
                    tokens[piece.document] += (piece.scored & ~is_eos).sum()
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


def score_pairs(scorer: Scorer, params: Any, evaluation_set: EvaluationSet) -> PairScores:
    """The log-probabilities of a set of pairs; under a reference's parameters, what `references` hold.

    Raises:
        ValueError: the set is not of pairs.
    """
    if evaluation_set.kind != "pairs":
        raise ValueError(f"{evaluation_set.name} is a set of {evaluation_set.kind}; expected one of pairs")
    return pair_scores(scorer.score(params, evaluation_set))


def pair_scores(scores: Sequence[Score]) -> PairScores:
    """The scores of a set of pairs, whose documents are chosen and rejected in turn."""
    log_probs = -np.array([score.nats for score in scores])
    tokens = np.array([score.tokens for score in scores], np.int64)
    return PairScores(
        chosen=log_probs[0::2],
        rejected=log_probs[1::2],
        chosen_tokens=tokens[0::2],
        rejected_tokens=tokens[1::2],
    )


def set_metrics(
    evaluation_set: EvaluationSet, scores: Sequence[Score], reference: PairReference | None = None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """A set's metrics, in all and of each language, in order of appearance.

    Those of texts and chats are `Score.metrics`, those of pairs `pair_metrics`.
    """
    pairs = pair_scores(scores) if evaluation_set.kind == "pairs" else None

    def metrics(members: Sequence[int]) -> dict[str, float]:
        if pairs is None:
            return sum((scores[n] for n in members), Score()).metrics()
        return pair_metrics(pairs.take(members), None if reference is None else reference.take(members))

    languages: dict[str, list[int]] = {}
    for n, example in enumerate(evaluation_set.examples):
        languages.setdefault(example.language, []).append(n)
    return metrics(range(len(evaluation_set.examples))), {
        language: metrics(members) for language, members in languages.items()
    }


def evaluate_sets(
    scorer: Scorer,
    params: Any,
    sets: Sequence[EvaluationSet],
    references: Mapping[str, PairReference] = {},
) -> dict[str, float]:
    """`eval/<set>/<metric>` of every set, and `eval/<set>:<language>/<metric>` where a set has several.

    Args:
        references: of sets of pairs by their name, what `score_pairs` gives for the reference; a set without
            one has no rewards.
    """
    numbers: dict[str, float] = {}
    for one in sets:
        whole, parts = set_metrics(one, scorer.score(params, one), references.get(one.name))
        groups = {one.name: whole}
        if len(parts) > 1:
            groups |= {f"{one.name}:{language}": part for language, part in parts.items()}
        for group, metrics in groups.items():
            numbers |= {f"eval/{group}/{metric}": value for metric, value in metrics.items()}
    return numbers
