"""The forward kernel: a program holds one block of queries of one head, and blocks of keys pass."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.gpu.plan import (
    MaskRefs,
    Plan,
    bounds_spec,
    load,
    loops,
    mask_arrays,
    mask_specs,
    padded,
    product,
    result,
    store,
)
from sealion_kernels.gpu.stretches import Stretches, key_stretches
from sealion_kernels.masks import AttentionMask
from sealion_kernels.softmax import LOG2_E, MASKED


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
    H = query.shape[-1]
    query, key, value = padded(query), padded(key), padded(value)
    B, T, N, P = query.shape
    S, K = key.shape[1:3]
    plan = Plan.make(mask, T, S, blocks.forward)
    stretches = key_stretches(mask, T, S, plan.sizes)
    of_query = pl.BlockSpec((None, T, None, P), lambda i, n, b: (b, 0, n, 0))
    of_key = pl.BlockSpec((None, S, None, P), lambda i, n, b: (b, 0, lax.div(n, N // K), 0))
    out, log_sum = pl.pallas_call(
        partial(_kernel, plan=plan, stretches=stretches, scale=scale),
        grid=(plan.query_blocks, N, B),
        in_specs=[bounds_spec(stretches), MaskRefs(*mask_specs(mask)), of_query, of_key, of_key],
        out_specs=[of_query, pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))],
        out_shape=[
            result(query.shape, query.dtype, query),
            result((B, N, T), jnp.float32, query),
        ],
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="attention_forward",
    )(stretches.bounds, mask_arrays(mask), query, key, value)
    return out[..., :H], log_sum.swapaxes(1, 2)


def _kernel(
    bounds_ref: Any,
    mask_refs: MaskRefs,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    log_sum_ref: Any,
    *,
    plan: Plan,
    stretches: Stretches,
    scale: float,
) -> None:
    # The last blocks first: under causality they take longest, and the short ones then fill the gaps.
    i = plan.query_blocks - 1 - pl.program_id(0)
    first, rows, columns = i * plan.sizes.query, plan.sizes.query, plan.sizes.key
    queries = plan.queries(mask_refs, i)
    q = load(q_ref, first, rows, plan.num_queries)

    def body(masked: bool) -> Any:
        def key_block(j: Array, carry: Any) -> Any:
            top, total, mixed = carry
            k = load(k_ref, j * columns, columns, plan.num_keys, full=not masked)
            scores = product(q, k, transposed=True) * (scale * LOG2_E)
            seen = plan.seen(queries, plan.keys(mask_refs, j), queries_down=True) if masked else None
            if seen is not None:
                scores = jnp.where(seen, scores, -jnp.inf)
            # Never infinite, since it starts finite: so what is not seen has weight 2^-inf = 0.
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_top[:, None])
            fade = jnp.exp2(top - new_top)
            v = load(v_ref, j * columns, columns, plan.num_keys, full=not masked)
            mixed = mixed * fade[:, None] + product(weights.astype(v.dtype), v)
            return new_top, total * fade + jnp.sum(weights, axis=1), mixed

        return key_block

    start = (
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, q.shape[1]), jnp.float32),
    )
    top, total, mixed = loops(bounds_ref, i, stretches, body, start)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    store(out_ref, mixed / safe[:, None], first, plan.num_queries)
    log_sum = (top + jnp.log2(safe)) * math.log(2)
    store(log_sum_ref, jnp.where(some, log_sum, -jnp.inf), first, plan.num_queries)
