"""Attention: the dense path against NumPy in float64, the blockwise path against the dense one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from sealion_kernels import AttentionMask, flash_attention
from sealion_kernels.attention import Implementation
from sealion_kernels.blockwise import _Plan, blockwise_attention
from sealion_kernels.dense import dense_attention

SCALE = 0.11
BLOCK = 32
K = 2
ALL = -1


class Case(NamedTuple):
    window: int | None
    """ALL: as long as the row."""
    packed: bool
    length: int
    group: int
    head_dim: int
    dtype: str
    causal: bool


# Every pair of values of two different columns occurs in some row.
PAIRWISE = [
    Case(None, False, 100, 4, 64, "bfloat16", True),
    Case(7, True, 64, 1, 64, "float32", False),
    Case(1, False, 37, 8, 128, "float32", False),
    Case(ALL, True, 64, 8, 128, "bfloat16", True),
    Case(ALL, True, 100, 4, 128, "float32", False),
    Case(None, True, 37, 1, 128, "bfloat16", False),
    Case(ALL, False, 37, 1, 64, "float32", True),
    Case(7, False, 100, 8, 128, "bfloat16", True),
    Case(1, True, 100, 1, 64, "bfloat16", True),
    Case(None, False, 64, 8, 64, "float32", False),
    Case(7, True, 37, 4, 64, "bfloat16", False),
    Case(1, True, 64, 4, 64, "bfloat16", True),
    Case(7, True, 100, 4, 64, "float32", True),
    # Only here do padded keys have nothing else to hide them.
    Case(None, False, 37, 1, 64, "float32", False),
]


def quick_jit(function: Callable) -> Callable:
    """`jax.jit` without XLA's optimisations: these run once, and compiling them is what takes time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def inputs(case: Case, batch: int = 2) -> tuple[jax.Array, ...]:
    """Query, key, value and a cotangent; queries large enough that attention is peaked."""
    rng = np.random.default_rng(0)
    q_shape = (batch, case.length, K * case.group, case.head_dim)
    k_shape = (batch, case.length, K, case.head_dim)
    arrays = [rng.normal(size=shape) for shape in (q_shape, k_shape, k_shape, q_shape)]
    arrays[0] *= 3
    return tuple(jnp.asarray(array, case.dtype) for array in arrays)


def mask_of(case: Case, batch: int = 2) -> AttentionMask:
    window = case.length if case.window == ALL else case.window
    segments = None
    if case.packed:
        cuts = np.array([[9, 40], [20, 33]])[:batch]
        segments = jnp.asarray(
            1 + (np.arange(case.length)[None, :, None] >= cuts[:, None]).sum(-1), jnp.int32
        )
    return AttentionMask(causal=case.causal, window=window, query_segments=segments, key_segments=segments)


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


def output_and_gradients(attend: Callable, case: Case, mask: AttentionMask, dtype: str) -> list[np.ndarray]:
    *arrays, d_out = (x.astype(dtype) for x in inputs(case))

    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=mask, scale=SCALE), *arrays)
        return [out, *vjp(d_out)]

    return [np.asarray(x, np.float64) for x in quick_jit(run)(arrays)]


def blocks(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    return blockwise_attention(q, k, v, block_size=BLOCK, **options)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error over the largest value.

    Over at least 5: with a single key the gradient is a difference of equal terms, some of them larger than
    that, and their rounding is left.
    """
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 5.0))


@pytest.mark.parametrize("case", PAIRWISE[1::3], ids=str)
def test_dense_equals_numpy(case: Case) -> None:
    q, k, v, _ = inputs(case, batch=1)
    mask = mask_of(case, batch=1)
    out = quick_jit(lambda q, k, v: dense_attention(q, k, v, mask=mask, scale=SCALE))(q, k, v)
    bound = 2e-6 if case.dtype == "float32" else 1e-2
    assert relative_error(np.asarray(out, np.float64), numpy_attention(q, k, v, mask)) < bound


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_blockwise_equals_dense_forward_and_backward(case: Case) -> None:
    """In bfloat16 the truth is the dense path in float32 on the same (rounded) inputs."""
    mask = mask_of(case)
    actual = output_and_gradients(blocks, case, mask, case.dtype)
    truth = output_and_gradients(dense_attention, case, mask, "float32")
    bound = 1e-5 if case.dtype == "float32" else 1.5e-2
    for name, a, b in zip(("out", "query", "key", "value"), actual, truth, strict=True):
        assert relative_error(a, b) < bound, name


def test_continuing_a_longer_row_of_keys() -> None:
    """Three queries at the end of a row give what they give inside the whole row."""
    case = Case(7, False, 70, 2, 16, "float32", True)
    q, k, v, _ = inputs(case)
    whole = quick_jit(lambda q, k, v: blocks(q, k, v, mask=AttentionMask(window=7), scale=SCALE))(q, k, v)
    last = AttentionMask(window=7, query_offset=67)
    implementations: tuple[Implementation, ...] = ("dense", "blockwise", "auto")
    for implementation in implementations:
        attend = partial(flash_attention, mask=last, scale=SCALE, implementation=implementation)
        out = quick_jit(attend)(q[:, 67:], k, v)
        np.testing.assert_allclose(out, whole[:, 67:], atol=1e-6)


@pytest.mark.parametrize("attend", [dense_attention, blocks])
def test_each_device_attends_to_its_own_rows(attend: Callable) -> None:
    """Under `shard_map`, which checks what varies over the devices: forward and backward."""
    case = Case(7, True, 40, 2, 16, "float32", True)
    *arrays, d_out = inputs(case)
    mask = mask_of(case)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, d_out: jax.Array) -> Any:
        own = replace(mask, query_segments=segments, key_segments=segments)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=own, scale=SCALE), q, k, v)
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


@pytest.mark.parametrize("attend", [dense_attention, blocks])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(attend: Callable) -> None:
    case = Case(None, False, 40, 2, 16, "float32", True)
    q, k, v, d_out = inputs(case)
    lonely = jnp.zeros((2, 40), jnp.int32).at[:, 33:].set(5)
    mask = AttentionMask(query_segments=lonely, key_segments=jnp.zeros((2, 40), jnp.int32))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=mask, scale=SCALE), q, k, v)
        return out, *vjp(d_out)

    out, dq, dk, dv = quick_jit(run)(q, k, v)
    assert not np.any(out[:, 33:])
    assert np.all(np.abs(out[:, :33]).max(-1) > 0)
    assert not np.any(dq[:, 33:])
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("attend", [dense_attention, blocks])
def test_a_document_changes_no_bit_of_another(attend: Callable) -> None:
    case = Case(None, True, 70, 2, 16, "float32", True)
    q, k, v, _ = inputs(case, batch=1)
    mask = mask_of(case, batch=1)
    assert mask.key_segments is not None
    second = np.asarray(mask.key_segments)[..., None, None] == 2
    run = quick_jit(lambda q, k, v: attend(q, k, v, mask=mask, scale=SCALE))
    before = np.asarray(run(q, k, v))
    after = np.asarray(run(*(jnp.where(second, 1e4 * x, x) for x in (q, k, v))))
    others = ~second[..., 0, 0]
    np.testing.assert_array_equal(before[others], after[others])
    assert not np.array_equal(before[~others], after[~others])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 8, 9, 20])
@pytest.mark.parametrize(("queries", "offset"), [(40, 0), (13, 27)])
def test_blocks_that_meet_are_those_with_something_to_see(
    causal: bool, window: int | None, queries: int, offset: int
) -> None:
    """So a local layer's cost follows its window, and nothing that is seen is left out."""
    mask = AttentionMask(causal=causal, window=window, query_offset=offset)
    plan = _Plan(scale=1.0, mask=mask, num_queries=queries, num_keys=40, query_block=8, key_block=8)
    # As long as the blocks are whole: a padded query may still ask for keys.
    seen = np.zeros((plan.query_blocks * 8, 40), bool)
    seen[:] = mask.dense(plan.query_blocks * 8, 40)[0]
    by_block = np.any(seen.reshape(plan.query_blocks, 8, 5, 8), axis=(1, 3))
    for i in range(plan.query_blocks):
        first, past = (int(x) for x in plan.keys_of(jnp.int32(i)))
        np.testing.assert_array_equal(by_block[i], [first <= j < past for j in range(5)])
    for j in range(5):
        first, past = (int(x) for x in plan.queries_of(jnp.int32(j)))
        np.testing.assert_array_equal(by_block[:, j], [first <= i < past for i in range(plan.query_blocks)])


@pytest.mark.parametrize("window", [None, 256])
def test_memory_of_both_passes_is_linear_in_the_length(window: int | None) -> None:
    def temporary_bytes(attend: Callable, length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: attend(q, k, v, mask=AttentionMask(window=window), scale=SCALE).sum()  # noqa: E731
        memory = quick_jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile().memory_analysis()
        return memory.temp_size_in_bytes

    by_block = [temporary_bytes(blocks, length) for length in (1024, 4096)]
    dense = temporary_bytes(dense_attention, 1024)
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
