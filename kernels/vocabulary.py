"""One device's part of a linear cross-entropy: logits of its tokens and its rows, in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sealion_kernels.precision import FLOAT32_BYTES, exact_of_tokens
from sealion_kernels.split import Part

MOST_TOKENS = 8192
"""At a time. For each chunk of logits the gradients of its tokens and of its rows are read and written; of
chunks of one size, squarish ones move least.
"""


class Scores(NamedTuple):
    """Of each target token, over the whole vocabulary; float32."""

    log_probs: Float[Array, "B T"]
    log_sum: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None
    matches: Float[Array, "B T"] | None


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How the logits are walked."""

    chunk_bytes: int
    """Of the float32 logits of a chunk, at most."""
    observe: bool
    """Also entropy and matches."""


class _Running(NamedTuple):
    """What is known after some of the logits."""

    top: Array
    total: Array
    """Sum of exp(logit - top)."""
    at_target: Array
    moment: Array | None
    """Sum of exp(logit - top) * (logit - top); for the entropy."""

    @classmethod
    def start(cls, targets: Array, walk: Walk) -> _Running:
        """After none."""
        zeros = jnp.zeros(targets.shape, jnp.float32)
        return cls(zeros - jnp.inf, zeros, zeros, zeros if walk.observe else None)


def scores(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "v D"],
    targets: Int[Array, "B T"],
    part: Part,
    walk: Walk,
) -> Scores:
    """Walks the vocabulary in chunks, with a running log-sum-exp, for some tokens after the others."""
    tokens = _Groups.of(targets.shape, MOST_TOKENS)
    rows = _Rows.cut(embedding, tokens.size, part, walk)

    def group(_: None, group: tuple[Array, Array]) -> tuple[None, Scores]:
        hidden, targets = group

        def step(running: _Running, c: Array) -> tuple[_Running, None]:
            return _fold(running, *rows.logits(hidden, c)[1:], targets), None

        running, _ = loop(step, _Running.start(targets, walk), rows.indices)
        return None, _finished(running, part)

    _, found = loop(group, None, (tokens.cut(hidden), tokens.cut(targets)))
    return jax.tree.map(tokens.uncut, found)


def scores_gradient(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "v D"],
    targets: Int[Array, "B T"],
    scores: Scores,
    cotangents: Scores,
    part: Part,
    walk: Walk,
) -> tuple[Float[Array, "B T D"], Float[Array, "v D"]]:
    """Gradients of hidden (of this part of the vocabulary) and of its rows, float32; walks it once more."""
    tokens = _Groups.of(targets.shape, MOST_TOKENS)
    rows = _Rows.cut(embedding, tokens.size, part, walk)

    def group(d_rows: Array, group: tuple[Array, Array, Scores, Scores]) -> tuple[Array, Array]:
        hidden, targets, scores, cotangents = group

        def step(carry: tuple[Array, Array], c: Array) -> tuple[tuple[Array, Array], None]:
            d_hidden, d_rows = carry
            chunk, logits, ids = rows.logits(hidden, c)
            d_logits = _logits_gradient(logits, ids == targets[..., None], scores, cotangents)
            d_logits = d_logits.astype(hidden.dtype)
            d_hidden += exact_of_tokens("BTV,VD->BTD", d_logits, chunk)
            d_chunk = exact_of_tokens("BTV,BTD->VD", d_logits, hidden)
            d_chunk += lax.dynamic_index_in_dim(d_rows, c, 0, keepdims=False)
            return (d_hidden, lax.dynamic_update_index_in_dim(d_rows, d_chunk, c, 0)), None

        (d_hidden, d_rows), _ = loop(step, (jnp.zeros(hidden.shape, jnp.float32), d_rows), rows.indices)
        return d_rows, d_hidden

    start = jnp.zeros(rows.rows.shape, jnp.float32)
    d_rows, d_hidden = loop(group, start, jax.tree.map(tokens.cut, (hidden, targets, scores, cotangents)))
    return tokens.uncut(d_hidden), rows.uncut(d_rows)


def _logits_gradient(logits: Array, hit: Array, scores: Scores, cotangents: Scores) -> Array:
    """Of a chunk of logits, float32, from the gradients of the scores."""
    log_p = logits - scores.log_sum[..., None]
    p = jnp.exp(log_p)
    d_logits = cotangents.log_probs[..., None] * (hit - p) + cotangents.log_sum[..., None] * p
    if scores.entropy is not None and cotangents.entropy is not None:
        surprise = jnp.where(p > 0, log_p, 0.0) + scores.entropy[..., None]
        d_logits -= cotangents.entropy[..., None] * p * surprise
    return d_logits


def loss_and_gradients(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "v D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    part: Part,
    walk: Walk,
    *,
    z_loss: float,
) -> tuple[Float[Array, ""], Scores, Float[Array, "B T D"], Float[Array, "v D"]]:
    """The weighted loss, and its gradients as far as this part of the vocabulary goes, float32.

    Walks the tokens in chunks, each of whose logits are computed once.
    """
    v = embedding.shape[0]
    tokens = _Groups.of(targets.shape, max(1, walk.chunk_bytes // (v * FLOAT32_BYTES)))
    ids = part.first_id(v) + jnp.arange(v, dtype=jnp.int32)

    def step(d_embedding: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Any]:
        h, target, weight = chunk
        logits = exact_of_tokens("BTD,VD->BTV", h, embedding)
        found = _finished(_fold(_Running.start(target, walk), logits, ids, target), part)
        hit = (ids == target[..., None]).astype(jnp.float32)
        p = jnp.exp(logits - found.log_sum[..., None])
        pull = (1 + 2 * z_loss * found.log_sum)[..., None] if z_loss else 1.0
        d_logits = (weight[..., None] * (p * pull - hit)).astype(h.dtype)
        d_h = exact_of_tokens("BTV,VD->BTD", d_logits, embedding)
        d_embedding += exact_of_tokens("BTV,BTD->VD", d_logits, h)
        loss = jnp.sum(weight * (-found.log_probs + z_loss * jnp.square(found.log_sum)))
        return d_embedding, (loss, found, d_h)

    start = jnp.zeros(embedding.shape, jnp.float32)
    d_embedding, (losses, found, d_hidden) = loop(
        step, start, jax.tree.map(tokens.cut, (hidden, targets, weights))
    )
    return jnp.sum(losses), jax.tree.map(tokens.uncut, found), tokens.uncut(d_hidden), d_embedding


def loop(step: Any, start: Any, items: Any) -> tuple[Any, Any]:
    """`lax.scan`, but straight through where there is one item."""
    if jax.tree.leaves(items)[0].shape[0] > 1:
        return lax.scan(step, start, items)
    carry, result = step(start, jax.tree.map(lambda x: x[0], items))
    return carry, jax.tree.map(lambda x: x[None], result)


class _Groups(NamedTuple):
    """Tokens [B, T] as groups [groups, 1, size], the last padded with zeros; a single one as it is."""

    shape: tuple[int, int]
    groups: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], most: int) -> _Groups:
        B, T = shape
        groups = -(-B * T // most)
        return cls((B, T), groups, -(-B * T // groups))

    def cut(self, array: Array) -> Array:
        """[B, T, ...] -> [groups, 1, size, ...]."""
        if self.groups == 1:
            return array[None]
        B, T = self.shape
        flat = array.reshape(B * T, *array.shape[2:])
        pad = [(0, self.groups * self.size - B * T)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, pad).reshape(self.groups, 1, self.size, *flat.shape[1:])

    def uncut(self, array: Array) -> Array:
        """[groups, 1, size, ...] -> [B, T, ...]."""
        if self.groups == 1:
            return array[0]
        B, T = self.shape
        return array.reshape(-1, *array.shape[3:])[: B * T].reshape(B, T, *array.shape[3:])


class _Rows(NamedTuple):
    """Rows of an embedding in chunks [chunks, rows of a chunk, D], the last padded."""

    rows: Array
    ids: Array
    """Of the rows of the first chunk."""
    count: int
    last_id: Array | int
    """The first that is not there: rows from it on are padding."""

    @classmethod
    def cut(cls, embedding: Array, tokens: int, part: Part, walk: Walk) -> _Rows:
        """In chunks that have no more logits of so many tokens than the walk allows."""
        v, D = embedding.shape
        columns = max(1, walk.chunk_bytes // (tokens * FLOAT32_BYTES))
        chunks = _chunks(v, columns)
        padded = jnp.pad(embedding, ((0, -v % chunks), (0, 0))) if v % chunks else embedding
        size = padded.shape[0] // chunks
        first = part.first_id(v)
        ids = first + jnp.arange(size, dtype=jnp.int32)
        return cls(padded.reshape(chunks, size, D), ids, v, first + v)

    @property
    def chunks(self) -> int:
        return self.rows.shape[0]

    @property
    def indices(self) -> Array:
        return jnp.arange(self.chunks, dtype=jnp.int32)

    def logits(self, hidden: Array, c: Array) -> tuple[Array, Array, Array]:
        """Chunk c's rows, their logits, and their token ids."""
        chunk = lax.dynamic_index_in_dim(self.rows, c, 0, keepdims=False)
        logits = exact_of_tokens("BTD,VD->BTV", hidden, chunk)
        ids = self.ids + c * self.rows.shape[1]
        if self.chunks * self.rows.shape[1] != self.count:
            real = ids < self.last_id
            logits, ids = jnp.where(real, logits, -jnp.inf), jnp.where(real, ids, -1)
        return chunk, logits, ids

    def uncut(self, rows: Array) -> Array:
        """[chunks, rows of a chunk, D] as the embedding's rows."""
        return rows.reshape(-1, rows.shape[-1])[: self.count]


def _chunks(vocab: int, columns: int) -> int:
    """The fewest chunks of at most `columns` rows, or a few more that divide the vocabulary.

    Of those that do, that whose rows have the largest power of two up to 256 in them, for the sake of tiles:
    262,208 rows make 64 chunks of 4,097, but 68 of 3,856.
    """
    least = -(-vocab // columns)
    dividing = [n for n in range(least, min(2 * least, vocab) + 1) if vocab % n == 0]
    return max(dividing, key=lambda n: (_power_of_two(vocab // n), -n), default=least)


def _power_of_two(size: int) -> int:
    return min(size & -size, 256)


def _fold(running: _Running, logits: Array, ids: Array, targets: Array) -> _Running:
    """With these logits, too."""
    top = jnp.maximum(running.top, logits.max(-1))
    # A part of the vocabulary may be all padding, and the first top is -inf.
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    away = logits - safe[..., None]
    exps = jnp.exp(away)
    fade = jnp.exp(running.top - safe)
    at_target = running.at_target + jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)
    moment = None
    if running.moment is not None:
        shift = jnp.where(jnp.isfinite(running.top), running.top - safe, 0.0)
        moment = (running.moment + running.total * shift) * fade
        moment += jnp.where(exps > 0, exps * away, 0.0).sum(-1)
    return _Running(top, running.total * fade + exps.sum(-1), at_target, moment)


def _finished(running: _Running, part: Part) -> Scores:
    """The whole vocabulary's scores, from those of its parts."""
    top = part.over_vocabulary(lax.pmax, running.top)
    fade = jnp.exp(running.top - top)
    total = part.over_vocabulary(lax.psum, running.total * fade)
    at_target = part.over_vocabulary(lax.psum, running.at_target)
    log_sum = top + jnp.log(total)
    entropy = matches = None
    if running.moment is not None:
        moment = (running.moment + running.total * (running.top - top)) * fade
        entropy = jnp.log(total) - part.over_vocabulary(lax.psum, moment) / total
        matches = (at_target >= top).astype(jnp.float32)
    return Scores(at_target - log_sum, log_sum, entropy, matches)
