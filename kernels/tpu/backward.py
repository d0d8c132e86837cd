"""The backward pass: gradients of keys and values by blocks of keys, and that of queries with them or after.

Where the gradient of all queries that share a head of keys fits into VMEM, one kernel makes all three: five
products for each pair of blocks. Where it does not, a second kernel makes that of the queries: seven.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.blocks import key_ranges, most_key_blocks, most_query_blocks, query_ranges
from sealion_kernels.masks import AttentionMask
from sealion_kernels.softmax import LOG2_E, MASKED
from sealion_kernels.tpu.geometry import (
    COLUMNS_TIMES_COLUMNS,
    LANES,
    ROWS_TIMES_COLUMNS,
    ROWS_TIMES_ROWS,
    Geometry,
    Ids,
    column,
    dot,
    position,
    wide,
)
from sealion_kernels.tpu.specs import Specs, attend_to_block, by_key_block, by_query_block, call
from sealion_kernels.tpu.vmem import chunk_of, for_backward


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    log_sum: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    *,
    scale: float,
    blocks: AttentionBlocks,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key and value, each in its dtype.

    Args:
        log_sum: as `forward` gave it.
        delta: for each query, sum(out * d_out), less the cotangent of `log_sum`.
    """
    of = Geometry.of(query, key, mask, blocks.backward, scale=scale)
    of, fused = for_backward(of, blocks.vmem_bytes, blocks.cores)
    arrays = (
        of.ids(mask),
        of.queries(query),
        of.keys(key),
        of.keys(value),
        of.queries(d_out),
        # A query that sees no key: any finite number does, as all its scores are masked.
        of.numbers(jnp.where(jnp.isfinite(log_sum), log_sum * LOG2_E, 0.0)),
        of.numbers(delta),
    )
    run = partial(call, of=of, arguments=arrays, vmem_bytes=blocks.vmem_bytes, interpret=interpret)
    dk, dv, *dq = _by_key_blocks(of, mask, arrays, run, fused=fused)
    dq = dq or _by_query_blocks(of, mask, arrays, run)
    return of.from_queries(dq[0]), of.from_keys(dk), of.from_keys(dv)


def _inputs(specs: Specs) -> tuple[Any, ...]:
    queries, keys, numbers = specs.queries, specs.keys, specs.numbers
    return specs.ids, queries, keys, keys, queries, numbers, numbers


def _by_key_blocks(of: Geometry, mask: AttentionMask, arrays: Any, run: Any, *, fused: bool) -> list[Array]:
    """Gradients of keys, of values and, if fused, of queries."""
    _, q, k, v, *_ = arrays
    lengths = (of.num_queries, of.num_keys, of.sizes)
    steps = max(most_query_blocks(mask, *lengths), 1)
    specs = by_key_block(of, steps)
    bk, H = of.sizes.key, of.head_dim
    outputs, out_specs = [(k.shape, k.dtype), (v.shape, v.dtype)], [specs.keys, specs.keys]
    scratch: list[Any] = [
        {kind: pltpu.VMEM((bk, LANES), jnp.int32) for kind in of.kinds},
        pltpu.VMEM((bk, H), jnp.float32),
        pltpu.VMEM((bk, H), jnp.float32),
    ]
    if fused:
        outputs.append((q.shape, q.dtype))
        out_specs.append(specs.row_of_queries)
        scratch.append(pltpu.VMEM((of.query_blocks, of.group, of.sizes.query, H), jnp.float32))
    return run(
        partial(_key_block_kernel, fused=fused),
        scalars=of.scalars(mask, query_ranges(mask, *lengths)),
        name="attention_backward" if fused else "attention_backward_keys",
        blocks=of.key_blocks,
        steps=steps,
        in_specs=_inputs(specs),
        out_specs=out_specs,
        outputs=outputs,
        scratch=scratch,
        in_any_order=2 if fused else 3,
        products=5 if fused else 4,
    )


def _key_block_kernel(of: Geometry, steps: int, num_scalars: int, *refs: Any, fused: bool) -> None:
    """One block of keys, and one of queries of all heads of a group; rows of the scores are keys.

    So what there is of each query (log-sum-exp, delta, ids) is a row as it is loaded.
    """
    scalars, refs = refs[:num_scalars], refs[num_scalars:]
    ids, q_ref, k_ref, v_ref, d_out_ref, log2_sum_ref, delta_ref, dk_ref, dv_ref = refs[:9]
    dq_ref = refs[9] if fused else None
    key_ids, dk_sum, dv_sum, *dq_sum = refs[10:] if fused else refs[9:]
    b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    i, there = position(scalars[0], scalars[1], b * of.key_blocks + j, step, steps)
    bq, bk = of.sizes.query, of.sizes.key
    chunk = chunk_of(bq)

    @pl.when(step == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        for kind in of.kinds:
            key_ids[kind][...] = column(ids[kind].keys[...])

    if dq_ref is not None:

        @pl.when((j == 0) & (step == 0))
        def _() -> None:
            def clear(block: Any, _: Any) -> None:
                dq_sum[0][block] = jnp.zeros(dq_sum[0].shape[1:], jnp.float32)

            lax.fori_loop(0, of.query_blocks, clear, None)

    def attend(g: Any, first: int, masked: bool) -> None:
        some = pl.ds(first, chunk)
        k, q, d_out = k_ref[...], q_ref[g, some, :], d_out_ref[g, some, :]
        scores = dot(k, q, ROWS_TIMES_ROWS) * (of.scale * LOG2_E)
        if masked:
            near = {
                kind: Ids(ids[kind].queries[:, some], wide(key_ids[kind][...], chunk)) for kind in of.kinds
            }
            seen = of.seen(i * bq + first, j * bk, near, (bk, chunk), query_axis=1)
            scores = jnp.where(seen, scores, MASKED)
        weights = jnp.exp2(scores - log2_sum_ref[g, :, some])
        dv_sum[...] += dot(weights.astype(q.dtype), d_out, ROWS_TIMES_COLUMNS)
        d_weights = dot(v_ref[...], d_out, ROWS_TIMES_ROWS)
        d_scores = (weights * (d_weights - delta_ref[g, :, some])).astype(q.dtype)
        dk_sum[...] += dot(d_scores, q, ROWS_TIMES_COLUMNS)
        if fused:
            dq_sum[0][i, g, some, :] += dot(d_scores, k, COLUMNS_TIMES_COLUMNS)

    attend_to_block(
        of,
        there,
        of.whole(b, i, j, scalars),
        range(0, bq, chunk),
        attend,
        lambda first: of.meets(i * bq + first, j * bk, chunk, bk),
    )

    @pl.when(step == steps - 1)
    def _() -> None:
        dk_ref[...] = (dk_sum[...] * of.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    if dq_ref is not None:

        @pl.when((j == of.key_blocks - 1) & (step == steps - 1))
        def _() -> None:
            def write(block: Any, _: Any) -> None:
                rows = pl.ds(pl.multiple_of(block * bq, bq), bq)
                dq_ref[:, rows, :] = (dq_sum[0][block] * of.scale).astype(dq_ref.dtype)

            lax.fori_loop(0, of.query_blocks, write, None)


def _by_query_blocks(of: Geometry, mask: AttentionMask, arrays: Any, run: Any) -> list[Array]:
    """The gradient of queries."""
    _, q, *_ = arrays
    lengths = (of.num_queries, of.num_keys, of.sizes)
    steps = max(most_key_blocks(mask, *lengths), 1)
    specs = by_query_block(of, steps)
    G, bq = of.group, of.sizes.query
    return run(
        _query_block_kernel,
        scalars=of.scalars(mask, key_ranges(mask, *lengths)),
        name="attention_backward_queries",
        blocks=of.query_blocks,
        steps=steps,
        in_specs=_inputs(specs),
        out_specs=[specs.queries],
        outputs=[(q.shape, q.dtype)],
        scratch=[
            {kind: pltpu.VMEM((bq, LANES), jnp.int32) for kind in of.kinds},
            pltpu.VMEM((G, bq, LANES), jnp.float32),
            pltpu.VMEM((G, bq, LANES), jnp.float32),
            pltpu.VMEM((G, bq, of.head_dim), jnp.float32),
        ],
        in_any_order=3,
        products=3,
    )


def _query_block_kernel(of: Geometry, steps: int, num_scalars: int, *refs: Any) -> None:
    """One block of queries of all heads of a group, and one block of keys; rows of the scores are queries."""
    scalars, refs = refs[:num_scalars], refs[num_scalars:]
    ids, q_ref, k_ref, v_ref, d_out_ref, log2_sum_ref, delta_ref, dq_ref = refs[:8]
    query_ids, log2_sums, deltas, dq_sum = refs[8:]
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j, there = position(scalars[0], scalars[1], b * of.query_blocks + i, step, steps)
    bq, bk = of.sizes.query, of.sizes.key
    chunk = chunk_of(bk)

    @pl.when(step == 0)
    def _() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for g in range(of.group):
            log2_sums[g] = column(log2_sum_ref[g])
            deltas[g] = column(delta_ref[g])
        for kind in of.kinds:
            query_ids[kind][...] = column(ids[kind].queries[...])

    def attend(g: Any, first: int, masked: bool) -> None:
        some = pl.ds(first, chunk)
        k = k_ref[some, :]
        scores = dot(q_ref[g], k, ROWS_TIMES_ROWS) * (of.scale * LOG2_E)
        if masked:
            near = {
                kind: Ids(wide(query_ids[kind][...], chunk), ids[kind].keys[:, some]) for kind in of.kinds
            }
            seen = of.seen(i * bq, j * bk + first, near, (bq, chunk), query_axis=0)
            scores = jnp.where(seen, scores, MASKED)
        weights = jnp.exp2(scores - wide(log2_sums[g], chunk))
        d_weights = dot(d_out_ref[g], v_ref[some, :], ROWS_TIMES_ROWS)
        d_scores = weights * (d_weights - wide(deltas[g], chunk))
        dq_sum[g] += dot(d_scores.astype(k.dtype), k, ROWS_TIMES_COLUMNS)

    attend_to_block(
        of,
        there,
        of.whole(b, i, j, scalars),
        range(0, bk, chunk),
        attend,
        lambda first: of.meets(i * bq, j * bk + first, bq, chunk),
    )

    @pl.when(step == steps - 1)
    def _() -> None:
        dq_ref[...] = (dq_sum[...] * of.scale).astype(dq_ref.dtype)
