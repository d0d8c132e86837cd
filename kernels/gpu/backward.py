"""The backward kernels: one for keys and values, one for queries; both compute the scores again."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.blocks import BlockSizes
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
from sealion_kernels.gpu.stretches import Stretches, key_stretches, query_stretches
from sealion_kernels.masks import AttentionMask
from sealion_kernels.softmax import LOG2_E


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
    H = query.shape[-1]
    inputs = _Inputs(
        query=padded(query),
        key=padded(key),
        value=padded(value),
        d_out=padded(d_out),
        log_sum=log_sum.swapaxes(1, 2),
        delta=delta.swapaxes(1, 2),
    )
    dq = _queries(inputs, mask, blocks.backward_queries or blocks.backward, scale, interpret)
    dk, dv = _keys(inputs, mask, blocks.backward, scale, interpret)
    return dq[..., :H], dk[..., :H], dv[..., :H]


class _Inputs(NamedTuple):
    """What both kernels read, in this order; P is a power of two."""

    query: Float[Array, "B T N P"]
    key: Float[Array, "B S K P"]
    value: Float[Array, "B S K P"]
    d_out: Float[Array, "B T N P"]
    log_sum: Float[Array, "B N T"]
    """One head's numbers side by side, as a block of queries reads them."""
    delta: Float[Array, "B N T"]


def _queries(
    inputs: _Inputs, mask: AttentionMask, sizes: BlockSizes, scale: float, interpret: bool
) -> Float[Array, "B T N P"]:
    B, T, N, P = inputs.query.shape
    S, K = inputs.key.shape[1:3]
    plan = Plan.make(mask, T, S, sizes)
    stretches = key_stretches(mask, T, S, plan.sizes)
    of_query = pl.BlockSpec((None, T, None, P), lambda i, n, b: (b, 0, n, 0))
    of_key = pl.BlockSpec((None, S, None, P), lambda i, n, b: (b, 0, lax.div(n, N // K), 0))
    number = pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))
    return pl.pallas_call(
        partial(_queries_kernel, plan=plan, stretches=stretches, scale=scale),
        grid=(plan.query_blocks, N, B),
        in_specs=[
            bounds_spec(stretches),
            MaskRefs(*mask_specs(mask)),
            *(of_query, of_key, of_key, of_query, number, number),
        ],
        out_specs=of_query,
        out_shape=result(inputs.query.shape, inputs.query.dtype, inputs.query),
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="attention_backward_queries",
    )(stretches.bounds, mask_arrays(mask), *inputs)


def _queries_kernel(
    bounds_ref: Any,
    mask_refs: MaskRefs,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    log_sum_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    *,
    plan: Plan,
    stretches: Stretches,
    scale: float,
) -> None:
    """A program holds one block of queries of one head, and blocks of keys pass."""
    i = plan.query_blocks - 1 - pl.program_id(0)  # the longest first, as in the forward pass
    first, rows, columns = i * plan.sizes.query, plan.sizes.query, plan.sizes.key
    queries = plan.queries(mask_refs, i)
    q, d_out = (load(ref, first, rows, plan.num_queries) for ref in (q_ref, d_out_ref))
    log_sum, delta = (load(ref, first, rows, plan.num_queries) for ref in (log_sum_ref, delta_ref))
    log_sum = log_sum * LOG2_E

    def body(masked: bool) -> Any:
        def key_block(j: Array, dq: Array) -> Array:
            k, v = (load(ref, j * columns, columns, plan.num_keys, full=not masked) for ref in (k_ref, v_ref))
            scores = product(q, k, transposed=True) * (scale * LOG2_E)
            weights = jnp.exp2(scores - log_sum[:, None])
            seen = plan.seen(queries, plan.keys(mask_refs, j), queries_down=True) if masked else None
            if seen is not None:
                weights = jnp.where(seen, weights, 0.0)
            d_weights = product(d_out, v, transposed=True)
            d_scores = weights * (d_weights - delta[:, None])
            return dq + product(d_scores.astype(k.dtype), k)

        return key_block

    dq = loops(bounds_ref, i, stretches, body, jnp.zeros(q.shape, jnp.float32))
    store(dq_ref, dq * scale, first, plan.num_queries)


def _keys(
    inputs: _Inputs, mask: AttentionMask, sizes: BlockSizes, scale: float, interpret: bool
) -> tuple[Float[Array, "B S K P"], Float[Array, "B S K P"]]:
    B, T, N, P = inputs.query.shape
    S, K = inputs.key.shape[1:3]
    G = N // K
    plan = Plan.make(mask, T, S, sizes)
    stretches = query_stretches(mask, T, S, plan.sizes)
    # Indices of an axis count in its blocks: block k of G query heads are those of key-value head k.
    of_query = pl.BlockSpec((None, T, G, P), lambda j, k, b: (b, 0, k, 0))
    of_key = pl.BlockSpec((None, S, None, P), lambda j, k, b: (b, 0, k, 0))
    number = pl.BlockSpec((None, G, T), lambda j, k, b: (b, k, 0))
    dk, dv = pl.pallas_call(
        partial(_keys_kernel, plan=plan, stretches=stretches, scale=scale, group=G),
        grid=(plan.key_blocks, K, B),
        in_specs=[
            bounds_spec(stretches),
            MaskRefs(*mask_specs(mask)),
            *(of_query, of_key, of_key, of_query, number, number),
        ],
        out_specs=[of_key, of_key],
        out_shape=[
            result(inputs.key.shape, inputs.key.dtype, inputs.query),
            result(inputs.value.shape, inputs.value.dtype, inputs.query),
        ],
        compiler_params=plan.compiler_params,
        interpret=interpret,
        name="attention_backward_keys",
    )(stretches.bounds, mask_arrays(mask), *inputs)
    return dk, dv


def _keys_kernel(
    bounds_ref: Any,
    mask_refs: MaskRefs,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    log_sum_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    plan: Plan,
    stretches: Stretches,
    scale: float,
    group: int,
) -> None:
    """A program holds one block of keys and values of one head, and blocks of its query heads pass.

    Scores stand on their side (keys down, queries across): so each product takes them as they are.
    """
    j = pl.program_id(0)
    first, rows, columns = j * plan.sizes.key, plan.sizes.key, plan.sizes.query
    keys = plan.keys(mask_refs, j)
    k, v = (load(ref, first, rows, plan.num_keys) for ref in (k_ref, v_ref))

    def body(masked: bool) -> Any:
        def query_block(turn: Array, carry: Any) -> Any:
            dk, dv = carry
            i, head = lax.div(turn, group), lax.rem(turn, group)
            at = partial(load, first=i * columns, size=columns, length=plan.num_queries, full=not masked)
            q, d_out = at(q_ref, head=head), at(d_out_ref, head=head)
            log_sum, delta = at(log_sum_ref, head=head), at(delta_ref, head=head)
            scores = product(k, q, transposed=True) * (scale * LOG2_E)
            weights = jnp.exp2(scores - (log_sum * LOG2_E)[None, :])
            seen = plan.seen(plan.queries(mask_refs, i), keys, queries_down=False) if masked else None
            if seen is not None:
                weights = jnp.where(seen, weights, 0.0)
            # Past the last query d_out and delta are zero, and so is what is added.
            d_weights = product(v, d_out, transposed=True)
            d_scores = weights * (d_weights - delta[None, :])
            dv += product(weights.astype(d_out.dtype), d_out)
            dk += product(d_scores.astype(q.dtype), q)
            return dk, dv

        return query_block

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = loops(bounds_ref, j, stretches, body, start, turns=group)
    store(dk_ref, dk * scale, first, plan.num_keys)
    store(dv_ref, dv, first, plan.num_keys)
