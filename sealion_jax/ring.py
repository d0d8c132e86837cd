"""Causal attention over a ring of devices, each with a run of every row's tokens, none with all keys.

Causality would give the device with the last run by far the most to do. So each exchanges its run for two
half-runs, c and 2C - 1 - c of 2C, whose work together is the same on every device:

    device         0        1        2        3
    has          0  1     2  3     4  5     6  7
    computes     0  7     1  6     2  5     3  4

First each attends to its own keys. Then keys and values go round, one device at a time, and on the way back
the sums of their gradients with them. Of a pair of half-runs that comes by, every device needs two products
of half-runs, with no mask but the segments:

    it comes from a device before      both halves of the queries see its first half, and none its second
    it comes from a device after       the second half of the queries sees both of its halves

The parts of a softmax are joined by their log-sums, in float32. The backward pass takes the log-sum of the
whole for each part, so that the gradients of the parts add up to the whole's (Liu, Zaharia, Abbeel 2023,
"Ring attention with blockwise transformers"). What a device holds is in proportion to its own tokens,
however long the row is, but for a factor: sums and joined values are float32, and half-runs are copied
where a step selects them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sealion_kernels import AttentionMask, Passes, score_shift
from sealion_kernels.softmax import ATTENTION_RESIDUALS


def ring_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    segments: Int[Array, "B t"],
    *,
    axis: str,
    **options: Any,
) -> Float[Array, "B t N H"]:
    """The mixed values of this device's tokens; to be called under `shard_map`.

    Args:
        segments: of these tokens; t is even.
        axis: the mesh axis that splits the tokens.
        options: of `flash_attention`: scale, implementation (not "dense"), target.
    """
    query, key, value, segments = (to_half_runs(x, axis) for x in (query, key, value, segments))
    half = query.shape[1] // 2
    own = Passes.of(query, key, _causal(segments), **options)
    part = Passes.of(query[:, :half], key[:, :half], _all(segments[:, :half], segments[:, :half]), **options)
    return from_half_runs(_attend(query, key, value, segments, _Ring(own, part, axis)), axis)


class _Ring(NamedTuple):
    """Who computes what."""

    own: Passes
    """Both half-runs against their own keys."""
    part: Passes
    """A half-run against another."""
    axis: str

    def pass_on(self, arrays: Any) -> Any:
        """Each device's to the next one."""
        devices = jax.lax.axis_size(self.axis)
        moves = [(c, (c + 1) % devices) for c in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, moves), arrays)

    def from_before(self, step: Array | int) -> Array:
        """Whether what has been passed on `step` times comes from a device before this one."""
        return jax.lax.axis_index(self.axis) >= step


def _causal(segments: Array) -> AttentionMask:
    return AttentionMask(query_segments=segments, key_segments=segments)


def _all(queries: Array, keys: Array) -> AttentionMask:
    """Within a segment, and no other limit."""
    return AttentionMask(causal=False, query_segments=queries, key_segments=keys)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, segments: Array, ring: _Ring) -> Array:
    return _forward(query, key, value, segments, ring)[0]


def _forward(query: Array, key: Array, value: Array, segments: Array, ring: _Ring) -> tuple[Array, Array]:
    """Mixed values in the query's dtype, and log-sums."""

    def join(step: Array | int, passed: tuple[Array, ...], so_far: _Joined) -> _Joined:
        before = ring.from_before(step)
        (a, b) = (ring.part.forward(*product) for product in _products(query, segments, passed, before))
        first = so_far.first.join(a[0], jnp.where(before, a[1], -jnp.inf))
        second = so_far.second.join(a[0], jnp.where(before, -jnp.inf, a[1])).join(*b)
        return _Joined(first, second)

    def step(carry: Any, number: Array) -> Any:
        passed, so_far = carry
        return (ring.pass_on(passed), join(number, passed, so_far)), None

    out, log_sum = ring.own.forward(query, key, value, _causal(segments))
    joined = _Joined(*map(_Part, jnp.split(out.astype(jnp.float32), 2, 1), jnp.split(log_sum, 2, 1)))
    last = jax.lax.axis_size(ring.axis) - 1
    start = ring.pass_on((key, value, segments)), joined
    (passed, joined), _ = jax.lax.scan(step, start, jnp.arange(1, last))
    first, second = join(last, passed, joined)
    out = jnp.concatenate([first.out, second.out], 1).astype(query.dtype)
    return out, jnp.concatenate([first.log_sum, second.log_sum], 1)


def _forward_rule(query: Array, key: Array, value: Array, segments: Array, ring: _Ring) -> Any:
    found = _forward(query, key, value, segments, ring)
    out, log_sum = map(checkpoint_name, found, ATTENTION_RESIDUALS)
    return out, (query, key, value, segments, out, log_sum)


def _backward_rule(ring: _Ring, saved: tuple[Array, ...], d_out: Array) -> Any:
    query, key, value, segments, out, log_sum = saved
    delta = score_shift(out, d_out)

    def add(step: Array | int, passed: tuple[Array, ...], sums: Any, d_query: Any) -> Any:
        """The sums that came with the keys and values, and the query's, with this step's."""
        before = ring.from_before(step)
        products = _products(query, segments, passed, before)
        known = zip(*(_queries(x, before) for x in (log_sum, delta, d_out)), strict=True)
        a, b = (ring.part.backward(*one, *rest) for one, rest in zip(products, known, strict=True))
        more = [_to_keys(*pair, before) for pair in zip(a[1:], b[1:], strict=True)]
        return _plus(sums, more), _plus(d_query, _to_queries(a[0], b[0], before))

    def step(carry: Any, number: Array) -> Any:
        passed, sums, d_query = carry
        return (ring.pass_on(passed), *add(number, passed, ring.pass_on(sums), d_query)), None

    d_query, *sums = (
        jnp.split(x.astype(jnp.float32), 2, 1)
        for x in ring.own.backward(query, key, value, _causal(segments), log_sum, delta, d_out)
    )
    last = jax.lax.axis_size(ring.axis) - 1
    start = ring.pass_on((key, value, segments)), sums, d_query
    (passed, sums, d_query), _ = jax.lax.scan(step, start, jnp.arange(1, last))
    sums, d_query = add(last, passed, ring.pass_on(sums), d_query)
    gradients = zip((d_query, *ring.pass_on(sums)), (query, key, value), strict=True)  # those of keys home
    return *(jnp.concatenate(halves, 1).astype(x.dtype) for halves, x in gradients), None


_attend.defvjp(_forward_rule, _backward_rule)


class _Part(NamedTuple):
    """Softmax over the keys so far: mixed values and log-sums, float32."""

    out: Float[Array, "B h N H"]
    log_sum: Float[Array, "B h N"]

    def join(self, out: Array, log_sum: Array) -> _Part:
        """With that over other keys, of which there may be none (-inf); so far there were some."""
        joined = jnp.logaddexp(self.log_sum, log_sum)
        ours, theirs = (jnp.exp(x - joined)[..., None] for x in (self.log_sum, log_sum))
        return _Part(self.out * ours + out.astype(jnp.float32) * theirs, joined)


class _Joined(NamedTuple):
    """Of the two half-runs."""

    first: _Part
    second: _Part


def _products(
    query: Array, segments: Array, passed: tuple[Array, ...], before: Array
) -> Iterator[tuple[Array, Array, Array, AttentionMask]]:
    """Query, key, value and mask of a step's two products, of half-runs."""
    of_queries = zip(_queries(query, before), _queries(segments, before), strict=True)
    of_keys = zip(*(_keys(x, before) for x in passed), strict=True)
    for (q, q_segments), (k, v, k_segments) in zip(of_queries, of_keys, strict=True):
        yield q, k, v, _all(q_segments, k_segments)


def _queries(x: Array, before: Array) -> tuple[Array, Array]:
    """Of both products, what belongs to their queries."""
    first, second = jnp.split(x, 2, 1)
    return jnp.where(before, first, second), second


def _keys(x: Array, before: Array) -> tuple[Array, Array]:
    """Likewise to their keys."""
    first, second = jnp.split(x, 2, 1)
    return first, jnp.where(before, first, second)


def _to_queries(a: Array, b: Array, before: Array) -> list[Array]:
    """To both half-runs, float32: the reverse of `_queries`."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return [jnp.where(before, a, 0), b + jnp.where(before, 0, a)]


def _to_keys(a: Array, b: Array, before: Array) -> list[Array]:
    """Likewise of `_keys`."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return [a + jnp.where(before, b, 0), jnp.where(before, 0, b)]


def _plus(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def to_half_runs(x: Array, axis: str) -> Array:
    """From a run along axis 1 to the half-runs c and 2C - 1 - c."""
    halves = zip(jnp.split(x, 2, 1), _moves(jax.lax.axis_size(axis)), strict=True)
    return _first_first(*(jax.lax.ppermute(half, axis, moves) for half, moves in halves), axis=axis)


def from_half_runs(x: Array, axis: str) -> Array:
    """Back again."""
    halves = jnp.split(_first_first(*jnp.split(x, 2, 1), axis=axis), 2, 1)
    back = ([(there, here) for here, there in moves] for moves in _moves(jax.lax.axis_size(axis)))
    moved = (jax.lax.ppermute(half, axis, moves) for half, moves in zip(halves, back, strict=True))
    return jnp.concatenate(list(moved), 1)


def _moves(devices: int) -> list[list[tuple[int, int]]]:
    """Where each device's half-runs go to be computed: the even ones, 2c, and the odd ones, 2c + 1."""
    return [
        [(c, min(2 * c + odd, 2 * devices - 1 - (2 * c + odd))) for c in range(devices)] for odd in range(2)
    ]


def _first_first(even: Array, odd: Array, *, axis: str) -> Array:
    """Half-run c and then 2C - 1 - c, of which one is even and one is odd; its own reverse."""
    swapped = jax.lax.axis_index(axis) % 2 == 1
    return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], 1)
