"""What is the TPU kernels' own: two ways backward, blocks that fit into VMEM, when no mask is needed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BOUNDS, Case, errors, mask_of, pairwise

from sealion_kernels import AttentionMask, Target, flash_attention
from sealion_kernels.block_table import AttentionBlocks, attention_blocks
from sealion_kernels.blocks import BlockSizes, key_ranges, meeting
from sealion_kernels.masks import Ids
from sealion_kernels.tpu.geometry import LANES, Geometry
from sealion_kernels.tpu.refusal import refusal
from sealion_kernels.tpu.vmem import (
    by_key_block_bytes,
    by_query_block_bytes,
    chunk_of,
    fitted,
    for_backward,
    forward_bytes,
)

V5E, V5P = (Target(platform="tpu", kind=kind) for kind in ("TPU v5 lite", "TPU v5"))
WHOLE = BlockSizes(query=LANES, key=LANES)


def arrays(
    *, rows: int = 1, queries: int, keys: int | None = None, heads: tuple[int, int], head_dim: int, dtype: Any
) -> tuple[Any, Any]:
    """Shapes of queries and keys."""
    N, K = heads
    shapes = (rows, queries, N, head_dim), (rows, keys or queries, K, head_dim)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("case", pairwise()[::3], ids=str)
def test_two_kernels_backward_equal_dense(case: Case) -> None:
    """As where one kernel for all gradients does not fit, or leaves a core idle, which is asked for here."""
    blocks = AttentionBlocks(
        forward=WHOLE, backward=BlockSizes(query=128, key=256), vmem_bytes=64 * 2**20, cores=1000
    )
    for name, error in errors("tpu", case, blocks=blocks).items():
        assert error < BOUNDS[case.dtype], name


@pytest.mark.parametrize(
    ("target", "heads", "head_dim", "length", "rows", "fused"),
    [
        (V5P, (32, 16), 128, 8192, 1, True),  # 27B
        (V5P, (8, 4), 256, 8192, 1, True),  # 4B
        (V5P, (4, 1), 256, 4096, 1, False),  # 1B: a single row is for two cores to share
        (V5E, (4, 1), 256, 8192, 1, True),
        (V5P, (8, 4), 256, 32768, 1, False),  # a row's gradient is 96 MiB
    ],
)
def test_one_kernel_makes_all_gradients_where_they_fit(
    target: Target, heads: tuple[int, int], head_dim: int, length: int, rows: int, fused: bool
) -> None:
    query, key = arrays(rows=rows, queries=length, heads=heads, head_dim=head_dim, dtype=jnp.bfloat16)
    table = attention_blocks(
        "tpu",
        target,
        num_queries=length,
        num_keys=length,
        window=None,
        head_dim=head_dim,
        group=heads[0] // heads[1],
        itemsize=2,
    )
    of = Geometry.of(query, key, AttentionMask(), table.backward, scale=1.0)
    assert for_backward(of, table.vmem_bytes, table.cores)[1] is fused
    names = str(jax.make_jaxpr(jax.grad(lambda q, k: attend(q, k, target).sum()))(query, key))
    assert ("attention_backward_queries" in names) is not fused


def attend(query: jax.Array, key: jax.Array, target: Target) -> jax.Array:
    return flash_attention(
        query, key, key, mask=AttentionMask(), scale=1.0, implementation="tpu", target=target
    )


@pytest.mark.parametrize("mib", [12, 48, 96])
def test_blocks_are_halved_until_they_fit(mib: int) -> None:
    limit = mib * 2**20
    needs = (forward_bytes, by_query_block_bytes, partial(by_key_block_bytes, fused=False))
    shapes = itertools.product((1, 2, 8), (64, 128, 256), (jnp.float32, jnp.bfloat16), (512, 768, 2048))
    for group, head_dim, dtype, block in shapes:
        query, key = arrays(queries=4096, heads=(group, 1), head_dim=head_dim, dtype=dtype)
        of = Geometry.of(query, key, AttentionMask(), BlockSizes(query=block, key=block), scale=1.0)
        for need in needs:
            found = fitted(of, limit, need)
            assert need(found) <= limit
            sizes = found.sizes.query, found.sizes.key
            assert all(size % LANES == 0 and LANES <= size <= block for size in sizes)
            assert all(size % chunk_of(size) == 0 for size in sizes)
            assert need(of) > limit or found.sizes == of.sizes  # no smaller than needed


def random_mask(rng: np.random.Generator, queries: int, keys: int) -> AttentionMask:
    """Numbers (some where a block is just seen as a whole, or just not) and ids of all kinds, in one row."""

    def runs(length: int, most: int) -> jax.Array:
        return jnp.asarray(np.repeat(rng.integers(0, 3, most), -(-length // most))[None, :length], jnp.int32)

    segments, spans = rng.random(2) < 0.4
    return AttentionMask(
        causal=bool(rng.integers(0, 2)),
        window=[None, 1, 127, 128, 255, 400][rng.integers(0, 6)],
        query_offset=[0, 0, 126, 127, 128, -1, -128][rng.integers(0, 7)],
        query_segments=runs(queries, 3) if segments else None,
        key_segments=runs(keys, 3) if segments else None,
        query_spans=runs(queries, 9) if spans else None,
        key_spans=runs(keys, 9) if spans else None,
    )


def test_a_block_without_a_mask_is_seen_as_a_whole_and_one_left_out_not_at_all() -> None:
    """Held to the dense mask, block by block, and the masks of blocks to it."""
    rng = np.random.default_rng(0)
    wholes = left_out = 0
    for _ in range(60):
        T, S = (int(n) for n in rng.choice([60, 300, 384, 512], 2))
        mask = random_mask(rng, T, S)
        query, key = arrays(queries=T, keys=S, heads=(2, 1), head_dim=8, dtype=jnp.float32)
        of = Geometry.of(query, key, mask, WHOLE, scale=1.0)
        dense = np.broadcast_to(mask.dense(T, S), (1, T, S))[0]
        scalars = [np.asarray(x) for x in of.scalars(mask, key_ranges(mask, T, S, of.sizes))]
        ids = {kind: [np.asarray(x)[0, 0] for x in pair] for kind, pair in of.ids(mask).items()}
        for i, j in itertools.product(range(of.query_blocks), range(of.key_blocks)):
            first_query, first_key = i * of.sizes.query, j * of.sizes.key
            shown = dense[first_query:, first_key:][: of.sizes.query, : of.sizes.key]
            full = shown.shape == (of.sizes.query, of.sizes.key)
            whole = bool(of.whole(0, i, j, scalars))
            wholes += whole
            assert not whole or (shown.all() and shown.shape[1] == of.sizes.key)
            if not (mask.has_spans or mask.query_segments is not None):
                assert whole or not full or not shown.all()  # by numbers alone it is known exactly
            if not of.meets(first_query, first_key, of.sizes.query, of.sizes.key):
                left_out += 1
                assert not shown.any()
            near = {kind: ids_of_block(pair, first_query, first_key, of.sizes) for kind, pair in ids.items()}
            shape = (of.sizes.query, of.sizes.key)
            seen = np.asarray(of.seen(first_query, first_key, near, shape, query_axis=0))
            np.testing.assert_array_equal(seen[: shown.shape[0], : shown.shape[1]], shown)
            assert not seen[:, shown.shape[1] :].any()  # keys that are padding
        if T % LANES == S % LANES == 0 and not mask.has_spans:
            assert of.pairs_of_blocks() == np.asarray(meeting(plain(mask), T, S, of.sizes)).sum()
    assert wholes > 20 and left_out > 20


def ids_of_block(pair: list[np.ndarray], first_query: int, first_key: int, sizes: BlockSizes) -> Any:
    """Ids of a block, queries down and keys across."""
    queries, keys = pair
    return Ids(
        queries[first_query:][: sizes.query, None],
        keys[first_key:][None, : sizes.key],
    )


def plain(mask: AttentionMask) -> AttentionMask:
    """Its numbers alone."""
    return replace(mask, query_segments=None, key_segments=None, query_spans=None, key_spans=None)


def test_refusals() -> None:
    mask = AttentionMask()
    fine = dict(queries=300, heads=(8, 1), head_dim=256, dtype=jnp.float32)
    assert refusal(*arrays(**fine), mask) is None
    for changes, reason in [
        ({"dtype": jnp.float16}, "multiplies float32 or bfloat16, not float16"),
        ({"head_dim": 520}, "head dims up to 512 in VMEM, not 520"),
        ({"heads": (64, 1), "head_dim": 512}, "all 64 query heads"),
    ]:
        assert reason in (refusal(*arrays(**{**fine, **changes}), mask) or "")
    query, key = (jnp.zeros((1, 8, 1, 520)),) * 2
    with pytest.raises(ValueError, match="attention implementation 'tpu' holds head dims up to 512"):
        flash_attention(query, key, key, mask=mask, scale=1.0, implementation="tpu")
    out = flash_attention(query, key, key, mask=mask, scale=1.0, target=V5P)  # auto: another can do it
    assert out.shape == query.shape


def test_ranges_of_packed_rows_are_those_of_their_documents() -> None:
    """Each kernel is told to load only blocks of the documents that its block is part of."""
    case = Case(True, None, True, False, 300, 2, 64, "float32")
    mask = mask_of(case)
    query, key = arrays(rows=2, queries=300, heads=(4, 2), head_dim=64, dtype=jnp.float32)
    of = Geometry.of(query, key, mask, WHOLE, scale=1.0)
    start, stop, query_segment, key_segment = of.scalars(mask, key_ranges(mask, 300, 300, of.sizes))
    # Segments end at 9, 40 and at 20, 77: the first blocks hold three, the others one alone.
    assert start.tolist() == [0, 0, 0] * 2 and stop.tolist() == [1, 2, 3] * 2
    assert query_segment.tolist()[1] == key_segment.tolist()[1] == 3
    assert query_segment.tolist()[0] != key_segment.tolist()[0]
