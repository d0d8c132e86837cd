"""The forward pass: for each block of queries, the blocks of keys that it meets, one after the other."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.blocks import key_ranges, most_key_blocks
from sealion_kernels.masks import AttentionMask
from sealion_kernels.softmax import LOG2_E, MASKED
from sealion_kernels.tpu.geometry import (
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
from sealion_kernels.tpu.specs import attend_to_block, by_query_block, call
from sealion_kernels.tpu.vmem import chunk_of, fitted, forward_bytes


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    scale: float,
    blocks: AttentionBlocks,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Mixed values in the query's dtype, and the log-sum-exp of the scores, float32."""
    of = Geometry.of(query, key, mask, blocks.forward, scale=scale)
    of = fitted(of, blocks.vmem_bytes, forward_bytes)
    lengths = (of.num_queries, of.num_keys, of.sizes)
    steps = max(most_key_blocks(mask, *lengths), 1)
    specs = by_query_block(of, steps)
    q = of.queries(query)
    G, bq = of.group, of.sizes.query
    out, log_sum = call(
        _kernel,
        of,
        of.scalars(mask, key_ranges(mask, *lengths)),
        (of.ids(mask), q, of.keys(key), of.keys(value)),
        name="attention_forward",
        blocks=of.query_blocks,
        steps=steps,
        in_specs=(specs.ids, specs.queries, specs.keys, specs.keys),
        out_specs=[specs.queries, specs.numbers],
        outputs=[
            (q.shape, q.dtype),
            ((of.batch, of.num_kv_heads, of.query_blocks, G, 1, bq), jnp.float32),
        ],
        scratch=[
            {kind: pltpu.VMEM((bq, LANES), jnp.int32) for kind in of.kinds},
            pltpu.VMEM((G, bq, LANES), jnp.float32),
            pltpu.VMEM((G, bq, LANES), jnp.float32),
            pltpu.VMEM((G, bq, of.head_dim), jnp.float32),
        ],
        in_any_order=3,
        vmem_bytes=blocks.vmem_bytes,
        products=2,
        interpret=interpret,
    )
    return of.from_queries(out), of.from_numbers(log_sum)


def _kernel(of: Geometry, steps: int, num_scalars: int, *refs: Any) -> None:
    """One block of queries of all heads of a group, and one block of keys."""
    scalars, refs = refs[:num_scalars], refs[num_scalars:]
    ids, q_ref, k_ref, v_ref, out_ref, log_sum_ref, query_ids, top_ref, total_ref, mixed_ref = refs
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j, there = position(scalars[0], scalars[1], b * of.query_blocks + i, step, steps)
    bq, bk = of.sizes.query, of.sizes.key
    chunk = chunk_of(bk)

    @pl.when(step == 0)
    def _() -> None:
        # Half of the score of a key that is not seen: against it the weight of such a key is 0, not 1.
        top_ref[...] = jnp.full_like(top_ref, MASKED / 2)
        total_ref[...] = jnp.zeros_like(total_ref)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)
        for kind in of.kinds:
            query_ids[kind][...] = column(ids[kind].queries[...])

    def attend(g: Any, first: int, masked: bool) -> None:
        some = pl.ds(first, chunk)
        v = v_ref[some, :]
        scores = dot(q_ref[g], k_ref[some, :], ROWS_TIMES_ROWS) * (of.scale * LOG2_E)
        if masked:
            near = {
                kind: Ids(wide(query_ids[kind][...], chunk), ids[kind].keys[:, some]) for kind in of.kinds
            }
            seen = of.seen(i * bq, j * bk + first, near, (bq, chunk), query_axis=0)
            scores = jnp.where(seen, scores, MASKED)
        top = top_ref[g]
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - wide(new_top, chunk))
        fade = jnp.exp2(top - new_top)
        # A sum for each lane: the lanes are added up once, at the end.
        total = sum(weights[:, lane : lane + LANES] for lane in range(0, chunk, LANES))
        mixed = dot(weights.astype(v.dtype), v, ROWS_TIMES_COLUMNS)
        top_ref[g] = new_top
        total_ref[g] = total_ref[g] * fade + total
        mixed_ref[g] = mixed_ref[g] * wide(fade, of.head_dim) + mixed

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
        @pl.loop(0, of.group)
        def _(g: Any) -> None:
            total = total_ref[g].sum(-1, keepdims=True)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out_ref[g] = (mixed_ref[g] / total).astype(out_ref.dtype)
            log_sum = jnp.where(some, (top_ref[g] + jnp.log2(total)) / LOG2_E, -jnp.inf)
            log_sum_ref[g] = log_sum.T[:1]
