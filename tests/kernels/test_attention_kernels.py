"""The Pallas kernels against the dense path: interpreted on a CPU, compiled on their own devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from sealion_kernels import AttentionMask, Target, flash_attention
from sealion_kernels.attention import Implementation
from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.blocks import BlockSizes

pytestmark = pytest.mark.slow


class Kernel(NamedTuple):
    """One of them."""

    name: Implementation
    smallest: int
    """Tokens of its smallest block."""
    odd_blocks: AttentionBlocks
    """Of another shape in each pass; two or more to a row of 300 tokens, on one side at least."""

    def __str__(self) -> str:
        return self.name

    @property
    def blocks(self) -> AttentionBlocks | None:
        """The odd ones, but on a GPU those of the table: the others take more shared memory than it has."""
        return None if self.name == Target.here().platform == "gpu" else self.odd_blocks


GPU = Kernel(
    "gpu",
    16,
    AttentionBlocks(
        forward=BlockSizes(query=64, key=128),
        backward=BlockSizes(query=128, key=64),
        backward_queries=BlockSizes(query=64, key=64),
    ),
)
TPU = Kernel(
    "tpu",
    128,
    AttentionBlocks(
        forward=BlockSizes(query=128, key=256),
        backward=BlockSizes(query=256, key=128),
        vmem_bytes=64 * 2**20,
    ),
)
EACH = pytest.mark.parametrize("kernel", [GPU, TPU], ids=str)


def attend(kernel: Kernel, q: Any, k: Any, v: Any, mask: AttentionMask, **options: Any) -> Any:
    options = {"blocks": kernel.blocks, **options}
    return flash_attention(
        q, k, v, mask=mask, scale=SCALE, implementation=kernel.name, return_log_sum=True, **options
    )


def both_passes(
    kernel: Kernel, q: Any, k: Any, v: Any, d_out: Any, d_log_sum: Any, mask: AttentionMask, **options: Any
) -> Any:
    """Output, log-sum and the gradients of query, key and value."""
    outputs, vjp = jax.vjp(lambda q, k, v: attend(kernel, q, k, v, mask, **options), q, k, v)
    return *outputs, *vjp((d_out, d_log_sum))


def assert_equals_dense(kernel: Kernel, arrays: Sequence[Any], mask: AttentionMask, **options: Any) -> Any:
    """Both passes over float32 arrays; what the kernel gave comes back."""
    dense = kernel._replace(name="dense")
    found, expected = quick_jit(
        lambda *a: (both_passes(kernel, *a, mask, **options), both_passes(dense, *a, mask))
    )(*arrays)
    for name, actual, truth in zip(OUTPUTS, found, expected, strict=True):
        assert relative_error(actual, truth) < BOUNDS["float32"], name
    return found


OUTPUTS = ("out", "log_sum", "d_query", "d_key", "d_value")


def small(**changes: Any) -> Case:
    """A causal case in float32, with two query heads for each key-value head."""
    case = Case(
        causal=True,
        window=None,
        packed=False,
        spans=False,
        length=100,
        group=2,
        head_dim=64,
        dtype="float32",
    )
    return case._replace(**changes)


@EACH
@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_equals_dense_forward_and_backward(kernel: Kernel, case: Case) -> None:
    for name, error in errors(kernel.name, case, blocks=kernel.blocks).items():
        assert error < BOUNDS[case.dtype], name


@EACH
@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [
        (3, 70, AttentionMask(query_offset=67)),
        (33, 100, AttentionMask(query_offset=67, window=7)),
        (90, 40, AttentionMask(causal=False)),
        (40, 100, AttentionMask(causal=False, window=9, query_offset=20)),
        (90, 40, AttentionMask(window=20)),  # the last queries see no key
        (5, 5, AttentionMask()),  # shorter than any block
    ],
    ids=["continues", "continues in a window", "fewer keys", "window both ways", "beyond the keys", "short"],
)
def test_rows_of_other_lengths(kernel: Kernel, queries: int, keys: int, mask: AttentionMask) -> None:
    arrays = cut(inputs(small()), queries, keys)
    assert_equals_dense(kernel, arrays, mask)


def cut(arrays: Sequence[jax.Array], queries: int, keys: int) -> list[jax.Array]:
    """Query, key, value and cotangents, so many tokens of each."""
    lengths = (queries, keys, keys, queries, queries)
    return [x[:, :length] for x, length in zip(arrays, lengths, strict=True)]


RANDOM = {"gpu": (41, 70, BlockSizes(query=16, key=32)), "tpu": (150, 300, BlockSizes(query=128, key=128))}
"""By kernel: queries and keys, and blocks that neither of them fills."""


@EACH
@pytest.mark.parametrize("ids", ["none", "segments", "spans"])
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_random_masks(kernel: Kernel, ids: str, data: Any) -> None:
    """Each mask is compiled, so they are few, and a failing one is not made smaller, which takes minutes."""
    queries, keys, block = RANDOM[kernel.name]
    segments = ids == "segments" or (ids == "spans" and data.draw(st.booleans()))
    mask = random_mask(data.draw, queries, keys, segments=segments, spans=ids == "spans")
    blocks = replace(kernel.odd_blocks, forward=block, backward=block, backward_queries=None)
    arrays = cut(inputs(small(length=keys, head_dim=16)), queries, keys)
    assert_equals_dense(kernel, arrays, mask, blocks=blocks)


@EACH
@pytest.mark.parametrize("head_dim", [24, 80])
def test_head_dims_that_are_no_power_of_two(kernel: Kernel, head_dim: int) -> None:
    for name, error in errors(kernel.name, small(head_dim=head_dim), blocks=kernel.blocks).items():
        assert error < BOUNDS["float32"], name


@EACH
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(kernel: Kernel) -> None:
    lonely = jnp.zeros((2, 100), jnp.int32).at[:, 33:].set(5)
    mask = AttentionMask(query_segments=lonely, key_segments=jnp.zeros((2, 100), jnp.int32))
    out, log_sum, dq, dk, dv = assert_equals_dense(kernel, inputs(small()), mask)
    assert not np.any(out[:, 33:])
    assert np.all(np.isneginf(log_sum[:, 33:]))
    assert np.all(np.isfinite(log_sum[:, :33]))
    assert not np.any(dq[:, 33:])
    assert not np.any(dk[:, 33:]) and not np.any(dv[:, 33:])


@EACH
def test_a_document_changes_no_bit_of_another(kernel: Kernel) -> None:
    *arrays, d_log_sum = inputs(small(), batch=1)
    mask = mask_of(small(packed=True), batch=1)
    assert mask.key_segments is not None
    second = np.asarray(mask.key_segments)[..., None] == 2
    run = quick_jit(lambda *a: both_passes(kernel, *a, mask))
    before = run(*arrays, d_log_sum)
    after = run(
        *(jnp.where(second[..., None], 1e3 * x, x) for x in arrays),
        jnp.where(second, 1e3 * d_log_sum, d_log_sum),
    )
    others = ~second[..., 0]
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(was)[others], np.asarray(now)[others])
        assert not np.array_equal(np.asarray(was)[~others], np.asarray(now)[~others])


@EACH
@pytest.mark.parametrize("hidden_by", ["window", "causality", "segments"])
def test_hidden_blocks_are_not_loaded(kernel: Kernel, hidden_by: str) -> None:
    """What is poisoned there would spoil everything that reads it, since 0 * nan is nan."""
    third = 2 * kernel.smallest
    q, k, v, d_out, d_log_sum = inputs(small(length=3 * third), batch=1)
    block = BlockSizes(query=kernel.smallest, key=kernel.smallest)
    blocks = replace(kernel.odd_blocks, forward=block, backward=block, backward_queries=None)
    ids = jnp.repeat(jnp.arange(3), third)[None]
    first, last = slice(0, third), slice(2 * third, 3 * third)
    mask, keys, queries = {
        # Keys of the first third are out of reach for queries of the last.
        "window": (AttentionMask(window=kernel.smallest + 1), first, last),
        "causality": (AttentionMask(), last, slice(0, 2 * third)),
        "segments": (AttentionMask(query_segments=ids, key_segments=ids), first, slice(third, 3 * third)),
    }[hidden_by]
    run = quick_jit(lambda *a: both_passes(kernel, *a, mask, blocks=blocks))
    out, _, dq, *_ = run(q, *(x.at[:, keys].set(jnp.nan) for x in (k, v)), d_out, d_log_sum)
    assert np.isfinite(out[:, queries]).all() and np.isfinite(dq[:, queries]).all()
    assert np.isnan(out[:, keys]).any()
    poisoned = [x.at[:, queries].set(jnp.nan) for x in (q, d_out)]
    *_, dk, dv = run(poisoned[0], k, v, poisoned[1], d_log_sum)
    assert np.isfinite(dk[:, keys]).all() and np.isfinite(dv[:, keys]).all()
    assert np.isnan(dk[:, queries]).any()


@EACH
def test_each_device_attends_to_its_own_rows(kernel: Kernel) -> None:
    """Under `shard_map`: forward and backward."""
    case = small(window=7, packed=True)
    mask = mask_of(case)

    def run(segments: Any, *arrays: Any) -> Any:
        own = replace(mask, query_segments=segments, key_segments=segments)
        return both_passes(kernel, *arrays, own)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    # Interpreting a kernel mixes what varies over devices with what does not.
    spread = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 6, out_specs=(rows,) * 5, check_vma=False)
    arrays = mask.query_segments, *inputs(case)
    for found, expected in zip(quick_jit(spread)(*arrays), quick_jit(run)(*arrays), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
