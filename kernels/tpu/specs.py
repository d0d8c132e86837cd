"""Which block of each array a step of the grid reads or writes, and how a kernel is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sealion_kernels.masks import Ids
from sealion_kernels.tpu.geometry import Geometry, like, position


class Specs(NamedTuple):
    """Of arrays as `Geometry` lays them out."""

    ids: dict[str, Ids]
    queries: pl.BlockSpec
    numbers: pl.BlockSpec
    keys: pl.BlockSpec
    row_of_queries: pl.BlockSpec
    """Of all queries that share a head of keys."""


def by_query_block(of: Geometry, steps: int) -> Specs:
    """For a grid (row, key-value head, block of queries, step of its keys)."""

    def key_block(b: Any, i: Any, step: Any, *scalars: Any) -> Any:
        return position(scalars[0], scalars[1], b * of.query_blocks + i, step, steps)[0]

    return _specs(of, lambda b, i, *_: i, key_block)


def by_key_block(of: Geometry, steps: int) -> Specs:
    """For a grid (row, key-value head, block of keys, step of its queries)."""

    def query_block(b: Any, j: Any, step: Any, *scalars: Any) -> Any:
        return position(scalars[0], scalars[1], b * of.key_blocks + j, step, steps)[0]

    return _specs(of, query_block, lambda b, j, *_: j)


def _specs(of: Geometry, i: Callable[..., Any], j: Callable[..., Any]) -> Specs:
    G, H, bq, bk = of.group, of.head_dim, of.sizes.query, of.sizes.key
    ids = Ids(
        pl.BlockSpec((None, 1, bq), lambda b, k, *at: (b, 0, i(b, *at))),
        pl.BlockSpec((None, 1, bk), lambda b, k, *at: (b, 0, j(b, *at))),
    )
    row = (None, None, G, of.query_blocks * bq, H)
    return Specs(
        ids=dict.fromkeys(of.kinds, ids),
        queries=pl.BlockSpec((None, None, G, bq, H), lambda b, k, *at: (b, k, 0, i(b, *at), 0)),
        numbers=pl.BlockSpec((None, None, None, G, 1, bq), lambda b, k, *at: (b, k, i(b, *at), 0, 0, 0)),
        keys=pl.BlockSpec((None, None, bk, H), lambda b, k, *at: (b, k, j(b, *at), 0)),
        row_of_queries=pl.BlockSpec(row, lambda b, k, *at: (b, k, 0, 0, 0)),
    )


def call(
    kernel: Callable[..., None],
    of: Geometry,
    scalars: tuple[jax.Array, ...],
    arguments: tuple[Any, ...],
    *,
    name: str,
    blocks: int,
    steps: int,
    in_specs: Any,
    out_specs: Any,
    outputs: Iterable[tuple[tuple[int, ...], Any]],
    scratch: list[Any],
    in_any_order: int,
    vmem_bytes: int,
    products: int,
    interpret: bool,
) -> list[jax.Array]:
    """What a kernel writes, for a grid of rows x key-value heads x blocks x steps.

    Args:
        outputs: shape and dtype of each.
        in_any_order: dimensions of the grid, from the first, whose order is free: two cores share them.
        products: of a block of queries and one of keys.
    """
    several = jax.tree.leaves((scalars, arguments))
    order: Any = ("parallel",) * in_any_order + ("arbitrary",) * (4 - in_any_order)
    return pl.pallas_call(
        partial(kernel, of, steps, len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(of.batch, of.num_kv_heads, blocks, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[like(shape, dtype, *several) for shape, dtype in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=vmem_bytes),
        cost_estimate=_cost(of, arguments, products),
        interpret=interpret,
        name=name,
    )(*scalars, *arguments)


def attend_to_block(
    of: Geometry,
    there: Any,
    whole: Any,
    chunks: Iterable[int],
    attend: Callable[[Any, int, bool], None],
    meets: Callable[[int], Any],
) -> None:
    """Calls `attend(head, first token, masked)` for the chunks of a block that meet the other side.

    A block that is seen as a whole has no mask and no branches, so that the work on its chunks overlaps.
    Heads are a loop of the program: written out one after the other, they would be megabytes of instructions.
    """

    @pl.when(there & whole)
    def _() -> None:
        @pl.loop(0, of.group)
        def _(g: Any) -> None:
            for first in chunks:
                attend(g, first, False)

    if whole is not True:

        @pl.when(there & ~whole)
        def _() -> None:
            @pl.loop(0, of.group)
            def _(g: Any) -> None:
                for first in chunks:
                    pl.when(meets(first))(partial(attend, g, first, True))


def _cost(of: Geometry, arguments: tuple[Any, ...], products: int) -> pl.CostEstimate:
    """By the mask's numbers: what segments hide is not known yet."""
    pairs = of.batch * of.num_kv_heads * of.pairs_of_blocks()
    scores = pairs * of.group * of.sizes.query * of.sizes.key
    moved = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arguments))
    again = pairs * 2 * min(of.sizes.key, of.group * of.sizes.query) * of.head_dim * of.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * scores * of.head_dim, transcendentals=scores, bytes_accessed=moved + again
    )
