"""Log-probabilities of target tokens straight from hidden states, in chunks of the vocabulary."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

FLOAT32_BYTES = 4
MOST_DEVICES = 256  # that a vocabulary is split over; a power of two


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    chunk_bytes: int = 128 * 2**20,
) -> Float[Array, "B T"]:
    """log softmax(hidden embedding^T) at the targets, float32; the logits are never all alive.

    The vocabulary is walked in chunks of logits [B, T, V / chunks], forward with a running log-sum-exp and
    backward again with the final one. So each row of the embedding is read once a pass, its gradient is
    complete after its chunk, and only the gradient of `hidden` is summed up, in float32. Products take
    `hidden`'s dtype as input and accumulate in float32. Chunks take every n-th row, so that however batch, T
    or vocabulary are split over devices, every device works on every chunk. Logits that all fit into one
    chunk are kept for the backward pass.

    Args:
        hidden: in the compute dtype.
        embedding: float32 or the compute dtype; its gradient comes in the same.
        targets: in [0, V); elsewhere, masked positions too, any value in range will do.
        chunk_bytes: most bytes of one chunk of float32 logits, of the global array: over devices that split
            batch, T or vocabulary each holds its share.

    Raises:
        ValueError: `chunk_bytes` does not hold one logit a token.
    """
    B, T, D = hidden.shape
    V = embedding.shape[0]
    if embedding.shape != (V, D) or targets.shape != (B, T):
        raise ValueError(
            f"expected hidden [B, T, D], embedding [V, D], targets [B, T], got {hidden.shape}, "
            f"{embedding.shape}, {targets.shape}"
        )
    columns = chunk_bytes // (B * T * FLOAT32_BYTES)
    if columns < 1:
        raise ValueError(
            f"chunk_bytes {chunk_bytes} holds less than one float32 logit for each of {B * T} tokens; "
            f"give at least {B * T * FLOAT32_BYTES} (in practice a thousand times that), or fewer tokens"
        )
    chunks = _chunks(V, columns)
    padded = jnp.pad(embedding, ((0, -V % chunks), (0, 0))) if V % chunks else embedding
    # [V, D] -> [rows of a chunk, chunks, D]: a chunk is every n-th row, a free reshape
    return _log_probs(hidden, padded.reshape(-1, chunks, D), targets, V)


def _chunks(vocab: int, columns: int) -> int:
    """The fewest chunks of at most `columns` rows, or a few more that divide the vocabulary.

    Of those that do, one whose rows can be split over most devices: 262,208 rows make 64 chunks of 4,097, but
    68 of 3,856.
    """
    least = -(-vocab // columns)
    dividing = [n for n in range(least, min(2 * least, vocab) + 1) if vocab % n == 0]
    return max(dividing, key=lambda n: (math.gcd(vocab // n, MOST_DEVICES), -n), default=least)


def _logits(hidden: Array, rows: Array, c: Array, vocab: int) -> tuple[Array, Array, Array]:
    """Chunk c's embedding rows in the compute dtype, its logits, and its token ids."""
    chunk = lax.dynamic_index_in_dim(rows, c, 1, keepdims=False).astype(hidden.dtype)
    logits = jnp.einsum("BTD,VD->BTV", hidden, chunk, preferred_element_type=jnp.float32)
    ids = jnp.arange(rows.shape[0], dtype=jnp.int32) * rows.shape[1] + c
    if rows.shape[0] * rows.shape[1] != vocab:
        logits = jnp.where(ids < vocab, logits, -jnp.inf)
    return chunk, logits, ids


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probs(hidden: Array, rows: Array, targets: Array, vocab: int) -> Array:
    return _forward(hidden, rows, targets, vocab)[0]


def _forward(hidden: Array, rows: Array, targets: Array, vocab: int) -> tuple[Array, Array, Array | None]:
    """Log-probabilities, the log-sum-exp of the logits, and the logits if one chunk holds them all."""

    def fold(carry: tuple[Array, Array, Array], logits: Array, ids: Array) -> tuple[Array, Array, Array]:
        top, total, at_target = carry
        new_top = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
        return new_top, total, at_target + jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    carry = (jnp.full(targets.shape, -jnp.inf, jnp.float32), zeros, zeros)
    kept = None
    if rows.shape[1] == 1:
        _, kept, ids = _logits(hidden, rows, jnp.int32(0), vocab)
        carry = fold(carry, kept, ids)
    else:
        chunks = jnp.arange(rows.shape[1], dtype=jnp.int32)
        step = lambda carry, c: (fold(carry, *_logits(hidden, rows, c, vocab)[1:]), None)  # noqa: E731
        carry, _ = lax.scan(step, carry, chunks)
    top, total, at_target = carry
    log_sum = top + jnp.log(total)
    return at_target - log_sum, log_sum, kept


def _forward_rule(hidden: Array, rows: Array, targets: Array, vocab: int):
    log_probs, log_sum, kept = _forward(hidden, rows, targets, vocab)
    return log_probs, (hidden, rows, targets, log_sum, kept)


def _backward_rule(vocab: int, saved, d_log_probs: Array):
    hidden, rows, targets, log_sum, kept = saved

    def step(carry: tuple[Array, Array], c: Array) -> tuple[tuple[Array, Array], None]:
        d_hidden, d_rows = carry
        # With `kept` the product inside is left unused, and compiled away.
        chunk, logits, ids = _logits(hidden, rows, c, vocab)
        logits = logits if kept is None else kept
        hit = (ids == targets[..., None]).astype(jnp.float32)
        d_logits = d_log_probs[..., None] * (hit - jnp.exp(logits - log_sum[..., None]))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += jnp.einsum("BTV,VD->BTD", d_logits, chunk, preferred_element_type=jnp.float32)
        d_chunk = jnp.einsum("BTV,BTD->VD", d_logits, hidden, preferred_element_type=jnp.float32)
        return (d_hidden, lax.dynamic_update_index_in_dim(d_rows, d_chunk.astype(rows.dtype), c, 1)), None

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(rows))
    (d_hidden, d_rows), _ = lax.scan(step, start, jnp.arange(rows.shape[1], dtype=jnp.int32))
    return d_hidden.astype(hidden.dtype), d_rows, None


_log_probs.defvjp(_forward_rule, _backward_rule)
