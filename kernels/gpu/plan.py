"""What the three kernels share: what they refuse, their tiles, loads that may run over an end, the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from sealion_kernels.blocks import BlockSizes, num_blocks
from sealion_kernels.gpu.stretches import Stretches
from sealion_kernels.gpu_blocks import SMALLEST, GpuBlockSizes, fitting
from sealion_kernels.masks import AttentionMask, Ids

LARGEST_HEAD_DIM = 256


def refusal(query: Array, key: Array, mask: AttentionMask) -> str | None:
    """Why this implementation cannot do it, or None."""
    del mask
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or query.dtype != key.dtype:
        return (
            f"takes queries and keys of one dtype, float32, bfloat16 or float16, not {query.dtype} and "
            f"{key.dtype}; cast them, or use 'blockwise'"
        )
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return (
            f"takes head dims up to {LARGEST_HEAD_DIM}, not {query.shape[-1]}, whose tiles would not fit "
            "shared memory; use 'blockwise'"
        )
    return None


class Tokens(NamedTuple):
    """Indices (among the keys) of a block's tokens, and their ids where the mask has any; all [block]."""

    index: Array
    segments: Array | None
    spans: Array | None


class MaskRefs(NamedTuple):
    """The mask's arrays, one row of the batch, as a kernel has them; None where there are none."""

    query_segments: Any
    key_segments: Any
    query_spans: Any
    key_spans: Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a call when its kernel is traced."""

    mask: AttentionMask
    """Its numbers: the arrays are arguments of the kernels."""
    num_queries: int
    num_keys: int
    sizes: GpuBlockSizes

    @classmethod
    def make(cls, mask: AttentionMask, num_queries: int, num_keys: int, sizes: BlockSizes) -> Plan:
        for side in (sizes.query, sizes.key):
            if side < SMALLEST or side & (side - 1):
                raise ValueError(
                    f"blocks of attention implementation 'gpu' must be powers of two from {SMALLEST} on, "
                    f"not {side}"
                )
        launch = sizes if isinstance(sizes, GpuBlockSizes) else GpuBlockSizes(query=0, key=0)
        return cls(
            mask=mask.numbers,
            num_queries=num_queries,
            num_keys=num_keys,
            sizes=GpuBlockSizes(
                query=fitting(sizes.query, num_queries),
                key=fitting(sizes.key, num_keys),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            ),
        )

    @property
    def query_blocks(self) -> int:
        """Blocks of queries, the last one perhaps not full."""
        return num_blocks(self.num_queries, self.sizes.query)

    @property
    def key_blocks(self) -> int:
        """Blocks of keys, the last one perhaps not full."""
        return num_blocks(self.num_keys, self.sizes.key)

    @property
    def compiler_params(self) -> triton.CompilerParams:
        """How the kernel is launched."""
        return triton.CompilerParams(num_warps=self.sizes.num_warps, num_stages=self.sizes.num_stages)

    def queries(self, refs: MaskRefs, i: Array) -> Tokens:
        """The tokens of block i of the queries."""
        first, size = i * self.sizes.query, self.sizes.query
        ids = (
            self._ids(ref, first, size, self.num_queries) for ref in (refs.query_segments, refs.query_spans)
        )
        return Tokens(self.mask.query_offset + first + lax.iota(jnp.int32, size), *ids)

    def keys(self, refs: MaskRefs, j: Array) -> Tokens:
        """The tokens of block j of the keys."""
        first, size = j * self.sizes.key, self.sizes.key
        ids = (self._ids(ref, first, size, self.num_keys) for ref in (refs.key_segments, refs.key_spans))
        return Tokens(first + lax.iota(jnp.int32, size), *ids)

    def seen(self, queries: Tokens, keys: Tokens, *, queries_down: bool) -> Array | None:
        """Whether queries see keys; None: all do.

        Args:
            queries_down: whether queries are the first axis; else keys are.
        """
        down, across = (lambda x: x[:, None]), (lambda x: x[None, :])
        q, k = (down, across) if queries_down else (across, down)
        distance = q(queries.index) - k(keys.index)
        segments, spans = (
            None if ours is None or theirs is None else Ids(q(ours), k(theirs))
            for ours, theirs in ((queries.segments, keys.segments), (queries.spans, keys.spans))
        )
        parts = self.mask.conditions(distance, segments=segments, spans=spans)
        if self.num_keys % self.sizes.key:
            parts.append(k(keys.index) < self.num_keys)
        return reduce(jnp.logical_and, parts) if parts else None

    def _ids(self, ref: Any, first: Array, size: int, length: int) -> Array | None:
        return None if ref is None else load(ref, first, size, length)


def load(ref: Any, first: Array, size: int, length: int, *, full: bool = False, head: Any = None) -> Array:
    """Rows `first` to `first + size` of an array of `length` rows, zeros past its end.

    Args:
        full: none of them is past the end.
        head: which of an array with several ([length, heads, P] or [heads, length]).
    """
    rows = pl.dslice(first, size)
    if head is None:
        view = ref.at[rows] if len(ref.shape) == 1 else ref.at[rows, :]
    else:
        view = ref.at[head, rows] if len(ref.shape) == 2 else ref.at[rows, head, :]
    if full or length % size == 0:
        return triton.load(view)
    inside = first + lax.iota(jnp.int32, size) < length
    return triton.load(view, mask=inside if len(view.shape) == 1 else inside[:, None], other=0)


def store(ref: Any, values: Array, first: Array, length: int) -> None:
    """Writes rows, but those past the end, in the array's dtype."""
    size = values.shape[0]
    view = ref.at[pl.dslice(first, size)] if values.ndim == 1 else ref.at[pl.dslice(first, size), :]
    inside = None
    if length % size:
        inside = first + lax.iota(jnp.int32, size) < length
        inside = inside if values.ndim == 1 else jnp.broadcast_to(inside[:, None], values.shape)
    triton.store(view, values.astype(ref.dtype), mask=inside)


def product(a: Array, b: Array, *, transposed: bool = False) -> Array:
    """a b, or a b^T, summed in float32, and of float32 without rounding the factors (to tf32)."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, trans_b=transposed, precision=exact)


def loops(
    bounds_ref: Any, block: Array, stretches: Stretches, body: Callable, carry: Any, *, turns: int = 1
) -> Any:
    """`body(masked)(turn, carry)` for every block that `block` meets; masked where the mask is needed.

    Args:
        turns: for each block; those of block i begin with turn i * turns.
    """
    for part, masked in _parts(stretches):
        start, stop = bounds_ref[block, part], bounds_ref[block, part + 1]
        carry = lax.fori_loop(start * turns, stop * turns, body(masked), carry)
    return carry


def _parts(stretches: Stretches) -> Iterator[tuple[int, bool]]:
    if stretches.before:
        yield 0, True
    yield 1, False
    if stretches.after:
        yield 2, True


def padded(array: Float[Array, "B T N H"]) -> Float[Array, "B T N P"]:
    """With zeros up to a head dim that is a power of two: scores and gradients stay what they are."""
    H = array.shape[-1]
    P = max(SMALLEST, 1 << (H - 1).bit_length())
    return array if P == H else jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, P - H)))


def result(shape: tuple[int, ...], dtype: Any, query: Array) -> jax.ShapeDtypeStruct:
    """What a kernel writes; under `shard_map` it varies over the devices as the queries do."""
    return jax.ShapeDtypeStruct.like(query).update(shape=shape, dtype=dtype, sharding=None, weak_type=False)


def mask_specs(mask: AttentionMask) -> list[pl.BlockSpec | None]:
    """Of the four arrays of `mask_arrays`: a row of the batch each. The grid's last axis is the batch."""
    return [
        None if array is None else pl.BlockSpec((None, array.shape[1]), lambda i, n, b: (b, 0))
        for array in mask_arrays(mask)
    ]


def mask_arrays(mask: AttentionMask) -> MaskRefs:
    """The arrays that the mask needs, in the order of `MaskRefs`."""
    spans = (mask.query_spans, mask.key_spans) if mask.has_spans else (None, None)
    return MaskRefs(mask.query_segments, mask.key_segments, *spans)


def bounds_spec(stretches: Stretches) -> pl.BlockSpec:
    """Of `Stretches.bounds`: those of a row of the batch, or those that all rows share."""
    rows, blocks, _ = stretches.bounds.shape
    return pl.BlockSpec((None, blocks, 4), lambda i, n, b: (b if rows > 1 else 0, 0, 0))
