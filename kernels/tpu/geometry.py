"""How arrays are cut for the kernels, and what of a block the mask shows: shared by all passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from sealion_kernels.blocks import LARGEST, BlockSizes, Ranges, extremes, num_blocks
from sealion_kernels.masks import AttentionMask, Ids

LANES = 128
"""Numbers in a row of a vector register; blocks are multiples of it, because both sides of a score are."""

ROWS_TIMES_COLUMNS = (((1,), (0,)), ((), ()))
ROWS_TIMES_ROWS = (((1,), (1,)), ((), ()))
COLUMNS_TIMES_COLUMNS = (((0,), (0,)), ((), ()))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything of a call that is known when it is traced."""

    batch: int
    num_queries: int
    num_keys: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: Any
    sizes: BlockSizes
    mask: AttentionMask
    """Its numbers: the arrays are arguments of the kernels."""
    kinds: tuple[str, ...]
    """Of ids that there are: segments, spans."""
    scale: float

    @classmethod
    def of(
        cls, query: Array, key: Array, mask: AttentionMask, sizes: BlockSizes, *, scale: float
    ) -> Geometry:
        """Of a call's arrays; block sizes become multiples of `LANES`, no longer than the rows need."""
        B, T, N, H = query.shape
        S, K = key.shape[1:3]
        kinds = ("segments",) if mask.query_segments is not None else ()
        return cls(
            batch=B,
            num_queries=T,
            num_keys=S,
            num_kv_heads=K,
            group=N // K,
            head_dim=H,
            dtype=jnp.dtype(query.dtype),
            sizes=BlockSizes(query=_fit(sizes.query, T), key=_fit(sizes.key, S)),
            mask=mask.numbers,
            kinds=(*kinds, "spans") if mask.has_spans else kinds,
            scale=scale,
        )

    @property
    def query_blocks(self) -> int:
        """Blocks of queries in a row."""
        return num_blocks(self.num_queries, self.sizes.query)

    @property
    def key_blocks(self) -> int:
        """Blocks of keys in a row."""
        return num_blocks(self.num_keys, self.sizes.key)

    def queries(self, array: Array) -> Array:
        """[B, T, N, H] -> [B, K, G, T, H], T padded to whole blocks."""
        B, T, _, H = array.shape
        array = array.reshape(B, T, self.num_kv_heads, self.group, H).transpose(0, 2, 3, 1, 4)
        return _padded(array, self.sizes.query, axis=3)

    def keys(self, array: Array) -> Array:
        """[B, S, K, H] -> [B, K, S, H], S padded to whole blocks."""
        return _padded(array.transpose(0, 2, 1, 3), self.sizes.key, axis=2)

    def numbers(self, array: Array) -> Array:
        """A number for each query and head, [B, T, N] -> [B, K, blocks, G, 1, block]: rows, not columns.

        A column of numbers would be held 128 wide.
        """
        array = _padded(array, self.sizes.query, axis=1)
        array = array.reshape(self.batch, self.query_blocks, self.sizes.query, self.num_kv_heads, self.group)
        return array.transpose(0, 3, 1, 4, 2)[..., None, :]

    def from_queries(self, array: Array) -> Array:
        """[B, K, G, T, H] -> [B, T, N, H], without the padding."""
        array = array.transpose(0, 3, 1, 2, 4)[:, : self.num_queries]
        return array.reshape(self.batch, self.num_queries, -1, self.head_dim)

    def from_keys(self, array: Array) -> Array:
        """[B, K, S, H] -> [B, S, K, H], without the padding."""
        return array.transpose(0, 2, 1, 3)[:, : self.num_keys]

    def from_numbers(self, array: Array) -> Array:
        """[B, K, blocks, G, 1, block] -> [B, T, N], without the padding."""
        array = (
            array[..., 0, :].transpose(0, 2, 4, 1, 3).reshape(self.batch, -1, self.num_kv_heads * self.group)
        )
        return array[:, : self.num_queries]

    def ids(self, mask: AttentionMask) -> dict[str, Ids]:
        """Each kind of ids as rows [B, 1, length], padded to whole blocks."""
        return {
            kind: Ids(
                _padded(getattr(mask, f"query_{kind}").astype(jnp.int32), self.sizes.query, axis=1)[:, None],
                _padded(getattr(mask, f"key_{kind}").astype(jnp.int32), self.sizes.key, axis=1)[:, None],
            )
            for kind in self.kinds
        }

    def scalars(self, mask: AttentionMask, ranges: Ranges) -> tuple[Array, ...]:
        """What decides which blocks are loaded and which need a mask, each flat int32.

        For each row and block: the first and one past the last block that it meets; the segment of each block
        of queries and of keys that has but one, and else two numbers that are never equal.
        """
        start, stop = (jnp.broadcast_to(x, (self.batch, x.shape[1])).reshape(-1) for x in ranges)
        if "segments" not in self.kinds:
            return start, stop
        rows = self.ids(mask)["segments"]
        return (
            start,
            stop,
            _only_id(rows.queries, self.sizes.query, LARGEST),
            _only_id(rows.keys, self.sizes.key, -LARGEST),
        )

    def whole(self, b: Array, i: Array, j: Array, scalars: Sequence[Any]) -> Any:
        """Whether all queries of block i see all keys of block j, and no mask is needed; may be static."""
        first = i * self.sizes.query, j * self.sizes.key
        every = self.mask.all_within(self.mask.distances(*first, *self._block))
        if "segments" in self.kinds:
            query_segment, key_segment = scalars[2:]
            every.append(query_segment[b * self.query_blocks + i] == key_segment[b * self.key_blocks + j])
        if self.num_keys % self.sizes.key:
            every.append((j + 1) * self.sizes.key <= self.num_keys)
        return _all(every)

    def meets(self, first_query: Any, first_key: Any, num_queries: int, num_keys: int) -> Any:
        """Whether, by numbers, any of some queries may see any of some keys; may be static."""
        distances = self.mask.distances(first_query, first_key, num_queries, num_keys)
        return _all(self.mask.some_within(distances, spans="spans" in self.kinds))

    def seen(
        self,
        first_query: Any,
        first_key: Any,
        ids: dict[str, Ids],
        shape: tuple[int, int],
        *,
        query_axis: int,
    ) -> Bool[Array, "rows columns"]:
        """Whether some queries see some keys.

        Args:
            first_query: index among the queries.
            ids: of those queries and keys, of shapes that broadcast to `shape`.
            query_axis: 0 where rows are queries, 1 where columns are.
        """
        key = lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
        distance = lax.broadcasted_iota(jnp.int32, shape, query_axis) - key
        distance += self.mask.query_offset + first_query - first_key
        every = self.mask.conditions(distance, segments=ids.get("segments"), spans=ids.get("spans"))
        if self.num_keys % self.sizes.key:
            every.append(key < self.num_keys - first_key)
        seen = _all(every)
        return jnp.ones(shape, bool) if seen is True else seen

    def pairs_of_blocks(self) -> int:
        """Of queries and of keys that, by numbers, meet."""
        i, j = np.arange(self.query_blocks)[:, None], np.arange(self.key_blocks)[None]
        met = self.meets(i * self.sizes.query, j * self.sizes.key, *self._block)
        return int(np.broadcast_to(met, (self.query_blocks, self.key_blocks)).sum())

    @property
    def _block(self) -> tuple[int, int]:
        return self.sizes.query, self.sizes.key


def position(start: Any, stop: Any, at: Any, step: Any, steps: int) -> tuple[Any, Any]:
    """The block of the other side at a step of the grid, and whether there is one.

    Where a range is shorter than the grid, its blocks come last: what is loaded for the steps before them is
    its first block, once, while the block before it is still computed.
    """
    block = stop[at] - steps + step
    return jnp.maximum(block, start[at]), block >= start[at]


def dot(a: Array, b: Array, dimensions: Any) -> Array:
    """The product of two matrices, float32; of float32 ones in float32."""
    exact = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def column(row: Array) -> Array:
    """A row [1, n] as a column that is held `LANES` wide, [n, LANES]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def wide(column: Array, width: int) -> Array:
    """A column that is held `LANES` wide, as wide as a matrix."""
    if width <= LANES:
        return column[:, :width]
    return jnp.tile(column, (1, num_blocks(width, LANES)))[:, :width]


def like(shape: Sequence[int], dtype: Any, *arrays: Array) -> Any:
    """A result's shape, which under `shard_map` varies over the axes that any of these varies over."""
    joined: Callable[..., Any] = lambda *xs: sum(  # noqa: E731
        jnp.broadcast_to(x.reshape(-1)[0].astype(dtype), shape) for x in xs
    )
    return jax.eval_shape(joined, *arrays)


def _fit(block: int, length: int) -> int:
    return min(block + -block % LANES, length + -length % LANES)


def _padded(array: Array, block: int, *, axis: int) -> Array:
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, pad) if pad[axis][1] else array


def _only_id(ids: Int[Array, "B 1 L"], block: int, otherwise: int) -> Int[Array, " blocks"]:
    least, largest = extremes(ids[:, 0], block)
    return jnp.where(least == largest, least, otherwise).reshape(-1)


def _all(every: Sequence[Any]) -> Any:
    found: Any = True
    for one in every:
        found = one if found is True else found & one
    return found
