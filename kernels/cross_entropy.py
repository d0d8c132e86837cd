"""Cross-entropy of a linear layer straight from its inputs: all logits are never alive at a time.

Two ways to the same numbers. Where the loss is a sum of the tokens' own terms with known weights, tokens
are walked in chunks, and the gradient is taken as soon as a chunk's logits are there: three products.
Otherwise the vocabulary is walked in chunks, forward with a running log-sum-exp and backward again with the
final one: four products, but any function of the log-probabilities can follow.

Over a mesh (`Split`) each device holds its rows and its part of the embedding, gathers the rest of the
embedding's columns once, sums its gradient in float32, and scatters that once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sealion_kernels import vocabulary
from sealion_kernels.precision import FLOAT32_BYTES
from sealion_kernels.split import EMBEDDING, HIDDEN, NOTHING, TOKENS, WHOLE, Part, Split, over
from sealion_kernels.targets import Target

CHUNK_BYTES = 128 * 2**20

LEAST_TOKENS_AT_ONCE = {"cpu": 64, "gpu": 1024, "tpu": 1024}
"""Tokens of a chunk from which taking the gradient at once is faster.

Each chunk then reads and writes the embedding's whole gradient, 8 V D bytes, to save a product, 2 t V D
operations: worth it from t = 4 x operations per byte of the device on, 40 on a CPU, 500 to 800 elsewhere.
"""


class CrossEntropy(NamedTuple):
    """What is known of each target token; float32."""

    log_probs: Float[Array, "B T"]
    """log softmax(hidden embedding^T) at the target."""
    log_sum: Float[Array, "B T"]
    """log sum exp of the logits."""
    entropy: Float[Array, "B T"] | None
    """Of the distribution, in nats; where asked for."""
    matches: Float[Array, "B T"] | None
    """1 where no other token has a larger logit; where asked for. Without gradient."""
    loss: Float[Array, ""] | None
    """Where weights are given."""


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static of a problem."""

    walk: vocabulary.Walk
    z_loss: float
    at_once: bool
    split: Split | None


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    weights: Float[Array, "B T"] | None = None,
    z_loss: float = 0.0,
    observe: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    split: Split | None = None,
    target: Target | None = None,
) -> CrossEntropy:
    """Log-probabilities of the targets, and what else is asked for; the logits are never all alive.

    Products take `hidden`'s dtype as input and accumulate in float32; so does the embedding's gradient.

    Args:
        hidden: in the compute dtype.
        embedding: float32 or the compute dtype; its gradient comes in the same.
        targets: in [0, V). Where `weights` are 0, any number will do, such as the -100 of masked positions;
            what is outside the range counts as the nearest id there.
        weights: with them `loss` is sum(weights * (-log_probs + z_loss * log_sum^2)), and all that has a
            gradient; they are constants. Without them `log_probs`, `log_sum` and `entropy` have one.
        z_loss: keeps log_sum near 0; only with weights.
        observe: also `entropy` and `matches`.
        chunk_bytes: most bytes of float32 logits alive at a time, on each device.
        split: how the arrays lie over a mesh; None where there is one device.
        target: the device to compute on; None is JAX's first.

    Raises:
        ValueError: shapes that do not fit each other, or `chunk_bytes` does not hold one logit a token.
    """
    _check(hidden, embedding, targets, weights)
    V = embedding.shape[0]
    if z_loss and weights is None:
        raise ValueError(
            "z_loss is a part of the loss, which needs weights; square log_sum yourself, or give them"
        )
    if not targets.size:
        return _of_no_tokens(targets, observe=observe, weighted=weights is not None)
    if weights is not None:
        targets = jnp.where(weights == 0, jnp.clip(targets, 0, V - 1), targets)
    tokens = hidden.shape[0] * hidden.shape[1] // (1 if split is None else split.parts("rows", "tokens"))
    columns = V // (1 if split is None else split.parts("vocab"))
    together = min(tokens, vocabulary.MOST_TOKENS)
    if chunk_bytes < together * FLOAT32_BYTES:
        raise ValueError(
            f"chunk_bytes {chunk_bytes} holds less than one float32 logit for each of {together} tokens; "
            f"give at least {together * FLOAT32_BYTES} (in practice a thousand times that), or fewer tokens"
        )
    platform = (target or Target.here()).platform
    chunk_tokens = min(chunk_bytes // (columns * FLOAT32_BYTES), tokens)
    enough = min(LEAST_TOKENS_AT_ONCE.get(platform, 1024), tokens)
    options = _Options(
        walk=vocabulary.Walk(chunk_bytes=chunk_bytes, observe=observe),
        z_loss=z_loss,
        at_once=weights is not None and chunk_tokens >= enough,
        split=split,
    )
    if weights is not None and options.at_once:
        found: Any = _loss_at_once(hidden, embedding, targets, weights.astype(jnp.float32), options)
        loss, scores = found
        return CrossEntropy(*jax.lax.stop_gradient(scores), loss=loss)
    scores: Any = _scores(hidden, embedding, targets, options)
    if weights is None:
        return CrossEntropy(*scores, loss=None)
    terms = -scores.log_probs + z_loss * jnp.square(scores.log_sum)
    loss = jnp.sum(jax.lax.stop_gradient(weights.astype(jnp.float32)) * terms)
    return CrossEntropy(*jax.lax.stop_gradient(scores), loss=loss)


def _of_no_tokens(targets: Array, *, observe: bool, weighted: bool) -> CrossEntropy:
    """Empty scores, and a loss of 0; hidden states and embedding have gradients of zero."""
    empty = jnp.zeros(targets.shape, jnp.float32)
    observed = empty if observe else None
    return CrossEntropy(empty, empty, observed, observed, jnp.float32(0) if weighted else None)


def _check(hidden: Array, embedding: Array, targets: Array, weights: Array | None) -> None:
    tokens, D = hidden.shape[:-1], hidden.shape[-1:]
    fits = hidden.ndim == 3 and embedding.ndim == 2 and embedding.shape[1:] == D and 0 not in embedding.shape
    if not fits or any(x is not None and x.shape != tokens for x in (targets, weights)):
        raise ValueError(
            "expected hidden [B, T, D], embedding [V, D], V and D at least 1, targets and weights [B, T], "
            f"got {hidden.shape}, {embedding.shape}, {targets.shape}, "
            f"{None if weights is None else weights.shape}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(hidden, embedding, targets, options: _Options) -> vocabulary.Scores:
    return _scores_forward(hidden, embedding, targets, options)[0]


def _scores_forward(hidden, embedding, targets, options: _Options):
    def local(hidden, embedding, targets):
        part = Part(options.split)
        whole = part.gathered(embedding, hidden.dtype)
        return vocabulary.scores(hidden, whole, targets, part, options.walk), whole

    here = over(options.split, local, (HIDDEN, EMBEDDING, TOKENS), [TOKENS, WHOLE])
    scores, whole = here(hidden, embedding, targets)
    return scores, (hidden, whole, targets, scores, jnp.zeros((0,), embedding.dtype))


def _scores_backward(options: _Options, saved, cotangents):
    hidden, whole, targets, scores, like = saved

    def local(hidden, whole, targets, scores, cotangents):
        part = Part(options.split)
        d_hidden, d_embedding = vocabulary.scores_gradient(
            hidden, whole, targets, scores, cotangents, part, options.walk
        )
        return part.summed(d_hidden).astype(hidden.dtype), part.scattered(d_embedding).astype(like.dtype)

    here = over(options.split, local, (HIDDEN, WHOLE, TOKENS, TOKENS, TOKENS), [HIDDEN, EMBEDDING])
    return *here(hidden, whole, targets, scores, cotangents), None


_scores.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_at_once(hidden, embedding, targets, weights, options: _Options):
    def local(hidden, embedding, targets, weights):
        part = Part(options.split)
        scores = vocabulary.scores(
            hidden, part.gathered(embedding, hidden.dtype), targets, part, options.walk
        )
        terms = weights * (-scores.log_probs + options.z_loss * jnp.square(scores.log_sum))
        return part.total(jnp.sum(terms)), scores

    here = over(options.split, local, (HIDDEN, EMBEDDING, TOKENS, TOKENS), [NOTHING, TOKENS])
    return here(hidden, embedding, targets, weights)


def _at_once_forward(hidden, embedding, targets, weights, options: _Options):
    def local(hidden, embedding, targets, weights):
        part = Part(options.split)
        whole = part.gathered(embedding, hidden.dtype)
        loss, scores, d_hidden, d_embedding = vocabulary.loss_and_gradients(
            hidden, whole, targets, weights, part, options.walk, z_loss=options.z_loss
        )
        d_hidden = part.summed(d_hidden).astype(hidden.dtype)
        return part.total(loss), scores, d_hidden, part.scattered(d_embedding)

    outputs = [NOTHING, TOKENS, HIDDEN, EMBEDDING]
    here = over(options.split, local, (HIDDEN, EMBEDDING, TOKENS, TOKENS), outputs)
    loss, scores, d_hidden, d_embedding = here(hidden, embedding, targets, weights)
    return (loss, scores), (d_hidden, d_embedding, jnp.zeros((0,), embedding.dtype))


def _at_once_backward(options: _Options, saved, cotangents):
    del options
    d_hidden, d_embedding, like = saved
    d_loss = cotangents[0]
    d_hidden = (d_loss * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype)
    return d_hidden, (d_loss * d_embedding).astype(like.dtype), None, None


_loss_at_once.defvjp(_at_once_forward, _at_once_backward)
