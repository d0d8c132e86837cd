"""Attention: the dense path against NumPy in float64, the blockwise path against the dense one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BOUNDS,
    SCALE,
    Case,
    errors,
    inputs,
    mask_of,
    pairwise,
    quick_jit,
    random_mask,
    relative_error,
    square,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from sealion_kernels import AttentionMask, flash_attention
from sealion_kernels.attention import Implementation
from sealion_kernels.blocks import (
    BlockSizes,
    key_ranges,
    meeting,
    most_key_blocks,
    most_query_blocks,
    query_ranges,
)

BLOCK = square(32)


def attend_by(implementation: Implementation) -> Callable:
    return partial(flash_attention, implementation=implementation, scale=SCALE, blocks=BLOCK)


BOTH = [attend_by("dense"), attend_by("blockwise")]


def both_passes(
    attend: Callable, q: Any, k: Any, v: Any, d_out: Any, d_log_sum: Any, mask: AttentionMask
) -> tuple[jax.Array, ...]:
    """Output, log-sum and the gradients of query, key and value."""
    outputs, vjp = jax.vjp(partial(attend, mask=mask, return_log_sum=True), q, k, v)
    return *outputs, *vjp((d_out, d_log_sum))


def plain(*, length: int, window: int | None = None, packed: bool = False) -> Case:
    """A small causal case in float32, with two query heads for each key-value head."""
    return Case(
        causal=True,
        window=window,
        packed=packed,
        spans=False,
        length=length,
        group=2,
        head_dim=16,
        dtype="float32",
    )


def numpy_attention(q: Any, k: Any, v: Any, mask: AttentionMask) -> np.ndarray:
    """One query at a time, one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    seen = np.broadcast_to(mask.dense(T, k.shape[1]), (B, T, k.shape[1]))
    out = np.zeros_like(q)
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        keys = np.flatnonzero(seen[b, t])
        if not len(keys):
            continue
        head = n // (N // k.shape[2])
        scores = k[b, keys, head] @ q[b, t, n] * SCALE
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, head] / weights.sum()
    return out


@pytest.mark.parametrize("case", pairwise()[::4], ids=str)
def test_dense_equals_numpy(case: Case) -> None:
    q, k, v, *_ = inputs(case, batch=1)
    mask = mask_of(case, batch=1)
    out = quick_jit(lambda q, k, v: attend_by("dense")(q, k, v, mask=mask))(q, k, v)
    bound = 2e-6 if case.dtype == "float32" else 1e-2
    assert relative_error(np.asarray(out, np.float64), numpy_attention(q, k, v, mask)) < bound


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_blockwise_equals_dense_forward_and_backward(case: Case) -> None:
    """In bfloat16 the truth is the dense path in float32 on the same (rounded) inputs."""
    for name, error in errors("blockwise", case, blocks=BLOCK).items():
        assert error < BOUNDS[case.dtype], name


def test_continuing_a_longer_row_of_keys() -> None:
    """Three queries at the end of a row give what they give inside the whole row."""
    case = plain(window=7, length=70)
    q, k, v, *_ = inputs(case)
    whole = quick_jit(lambda q, k, v: attend_by("blockwise")(q, k, v, mask=AttentionMask(window=7)))(q, k, v)
    last = AttentionMask(window=7, query_offset=67)
    implementations: tuple[Implementation, ...] = ("dense", "blockwise", "auto")
    for implementation in implementations:
        attend = partial(flash_attention, mask=last, scale=SCALE, implementation=implementation)
        out = quick_jit(attend)(q[:, 67:], k, v)
        np.testing.assert_allclose(out, whole[:, 67:], atol=1e-6)


@pytest.mark.parametrize("attend", BOTH, ids=["dense", "blockwise"])
def test_each_device_attends_to_its_own_rows(attend: Callable) -> None:
    """Under `shard_map`, which checks what varies over the devices: forward and backward."""
    case = plain(window=7, packed=True, length=40)
    *arrays, d_out, _ = inputs(case)
    mask = mask_of(case)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, d_out: jax.Array) -> Any:
        own = replace(mask, query_segments=segments, key_segments=segments)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=own), q, k, v)
        return out, *vjp(d_out)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    spread = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 5, out_specs=(rows,) * 4)
    for found, expected in zip(
        quick_jit(spread)(*arrays, mask.query_segments, d_out),
        quick_jit(run)(*arrays, mask.query_segments, d_out),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("attend", BOTH, ids=["dense", "blockwise"])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(attend: Callable) -> None:
    case = plain(length=40)
    q, k, v, d_out, d_log_sum = inputs(case)
    lonely = jnp.zeros((2, 40), jnp.int32).at[:, 33:].set(5)
    mask = AttentionMask(query_segments=lonely, key_segments=jnp.zeros((2, 40), jnp.int32))

    run = quick_jit(lambda *a: both_passes(attend, *a, mask))
    found = out, log_sum, dq, *_ = run(q, k, v, d_out, d_log_sum)
    assert not np.any(out[:, 33:]) and np.all(np.isneginf(log_sum[:, 33:]))
    assert np.all(np.abs(out[:, :33]).max(-1) > 0)
    assert not np.any(dq[:, 33:])
    # So it is as if the others were all.
    seeing = [x[:, :33] for x in (q, k, v, d_out, d_log_sum)]
    expected = quick_jit(lambda *a: both_passes(BOTH[0], *a, AttentionMask()))(*seeing)
    for actual, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual[:, :33], truth, atol=1e-5)
    assert not any(np.any(x[:, 33:]) for x in found[3:])  # a causal query sees no key after it


@pytest.mark.parametrize("attend", BOTH, ids=["dense", "blockwise"])
def test_a_document_changes_no_bit_of_another(attend: Callable) -> None:
    """Of output, log-sum and gradients; the first document ends, and the second begins, inside a block."""
    case = plain(packed=True, length=70)
    *arrays, d_log_sum = inputs(case, batch=1)
    mask = mask_of(case, batch=1)
    assert mask.key_segments is not None
    second = np.asarray(mask.key_segments)[..., None] == 2
    run = quick_jit(lambda *a: both_passes(attend, *a, mask))
    before = run(*arrays, d_log_sum)
    after = run(
        *(jnp.where(second[..., None], 1e4 * x, x) for x in arrays),
        jnp.where(second, 1e4 * d_log_sum, d_log_sum),
    )
    others = ~second[..., 0]
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(was)[others], np.asarray(now)[others])
        assert not np.array_equal(np.asarray(was)[~others], np.asarray(now)[~others])


@pytest.mark.parametrize("window", [None, 256])
def test_memory_of_both_passes_is_linear_in_the_length(window: int | None) -> None:
    def temporary_bytes(attend: Callable, length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: attend(q, k, v, mask=AttentionMask(window=window)).sum()  # noqa: E731
        memory = quick_jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile().memory_analysis()
        return memory.temp_size_in_bytes

    by_block = [temporary_bytes(BOTH[1], length) for length in (1024, 4096)]
    dense = temporary_bytes(BOTH[0], 1024)
    assert by_block[1] < 4.2 * by_block[0]
    assert by_block[0] < dense / 4


def test_what_does_not_fit_is_refused() -> None:
    q, k = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 2, 16))
    causal = AttentionMask()
    wrong: list[Any] = [
        ("expected query", q[0], k, k, causal, "auto"),
        ("expected query", q, k, k[:, :4], causal, "auto"),
        ("batch or head dim", q[:1], k, k, causal, "auto"),
        ("use a multiple of 3", q, jnp.zeros((2, 8, 3, 16)), jnp.zeros((2, 8, 3, 16)), causal, "auto"),
        ("implementation must be", q, k, k, causal, "cudnn"),
        ("key is float32 and value bfloat16", q, k, k.astype(jnp.bfloat16), causal, "auto"),
        ("no heads, or heads of no dimension", q, k[:, :, :0], k[:, :, :0], causal, "auto"),
        ("no heads, or heads of no dimension", q[..., :0], k[..., :0], k[..., :0], causal, "auto"),
        ("implementation must be", q[:, :0], k, k, causal, "cudnn"),
        (
            "segments have shapes",
            q,
            k,
            k,
            AttentionMask(query_segments=jnp.ones((2, 7)), key_segments=jnp.ones((2, 8))),
            "auto",
        ),
    ]
    for message, q_, k_, v_, mask, implementation in wrong:
        with pytest.raises(ValueError, match=message):
            flash_attention(q_, k_, v_, mask=mask, scale=1.0, implementation=implementation)


@pytest.mark.parametrize("implementation", ["auto", "dense", "blockwise", "gpu", "tpu"])
@pytest.mark.parametrize(("rows", "queries", "keys"), [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_of_nothing_come_zeros_and_gradients_of_zero(
    implementation: Implementation, rows: int, queries: int, keys: int, packed: bool
) -> None:
    q, k = jnp.ones((rows, queries, 4, 16), jnp.bfloat16), jnp.ones((rows, keys, 2, 16), jnp.bfloat16)
    ids = {"query_segments": (rows, queries), "key_segments": (rows, keys)} if packed else {}
    mask = AttentionMask(**{name: jnp.ones(shape, jnp.int32) for name, shape in ids.items()})
    attend = partial(
        flash_attention, mask=mask, scale=SCALE, implementation=implementation, return_log_sum=True
    )

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        outputs, vjp = jax.vjp(attend, q, k, v)
        return *outputs, *vjp(outputs)

    out, log_sum, *gradients = jax.jit(run)(q, k, k)
    assert [x.shape for x in (out, log_sum)] == [q.shape, q.shape[:-1]]
    assert (out.dtype, log_sum.dtype) == (jnp.bfloat16, jnp.float32)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]
    assert np.all(np.isneginf(log_sum)) and not any(np.any(x) for x in (out, *gradients))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_masks(data: Any) -> None:
    """Blockwise and dense agree, forward and backward; blocks that are left out have nothing to see."""
    T, S = data.draw(st.sampled_from([(40, 40), (13, 40), (33, 64)]))
    segments, spans = data.draw(st.booleans()), data.draw(st.booleans())
    mask = random_mask(data.draw, T, S, segments=segments, spans=spans)
    sizes = BLOCK.forward
    seen = np.zeros((2, -(-T // sizes.query) * sizes.query, -(-S // sizes.key) * sizes.key), bool)
    seen[:, :T, :S] = mask.dense(T, S)
    by_block = seen.reshape(2, -1, sizes.query, seen.shape[2] // sizes.key, sizes.key).any((2, 4))
    for ranges, needed in (
        (key_ranges(mask, T, S, sizes), by_block),
        (query_ranges(mask, T, S, sizes), by_block.swapaxes(1, 2)),
    ):
        others = np.arange(needed.shape[2])
        inside = (others >= ranges.start[..., None]) & (others < ranges.stop[..., None])
        assert not np.any(needed & ~inside)
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(rng.normal(size=(2, T, 4, 16)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, S, 2, 16)), jnp.float32) for _ in range(2))
    d_log_sum = jnp.asarray(rng.normal(size=(2, T, 4)), jnp.float32)

    def run(*arrays: jax.Array) -> Any:
        return [both_passes(attend, *arrays, mask) for attend in BOTH]

    dense, blockwise = quick_jit(run)(q, k, v, d_out, d_log_sum)
    for found, expected in zip(blockwise, dense, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 8, 9, 20])
@pytest.mark.parametrize(("queries", "offset"), [(40, 0), (16, 24)])
def test_ranges_are_exact_without_arrays(causal: bool, window: int | None, queries: int, offset: int) -> None:
    """So a local layer's cost follows its window."""
    mask = AttentionMask(causal=causal, window=window, query_offset=offset)
    sizes = BlockSizes(query=8, key=8)
    by_block = np.asarray(mask.dense(queries, 40)[0]).reshape(-1, 8, 5, 8).any((1, 3))
    np.testing.assert_array_equal(meeting(mask, queries, 40, sizes)[0], by_block)
    assert most_key_blocks(mask, queries, 40, sizes) == by_block.sum(1).max()
    assert most_query_blocks(mask, queries, 40, sizes) == by_block.sum(0).max()
    start, stop = key_ranges(mask, queries, 40, sizes)
    np.testing.assert_array_equal(stop[0] - start[0], by_block.sum(1))


def test_packed_documents_leave_out_the_blocks_between_them() -> None:
    """Four documents of ten tokens in blocks of five: a block meets its own document alone."""
    ids = jnp.repeat(jnp.arange(4), 10)[None]
    mask = AttentionMask(query_segments=ids, key_segments=ids)
    start, stop = key_ranges(mask, 40, 40, BlockSizes(query=5, key=5))
    np.testing.assert_array_equal(start[0], [0, 0, 2, 2, 4, 4, 6, 6])
    np.testing.assert_array_equal(stop[0], [1, 2, 3, 4, 5, 6, 7, 8])
