"""The Pallas kernels against the dense path: interpreted on a CPU, compiled on their own devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BOUNDS, SCALE, Case, errors, inputs, mask_of, pairwise, quick_jit, relative_error
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
    kernel: Kernel, q: Any, k: Any, v: Any, d_out: Any, mask: AttentionMask, **options: Any
) -> Any:
    """Output and the gradients of query, key and value."""
    out, vjp = jax.vjp(lambda q, k, v: attend(kernel, q, k, v, mask, **options)[0], q, k, v)
    return out, *vjp(d_out)


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
    q, k, v, d_out, _ = inputs(small())
    arrays = q[:, :queries], k[:, :keys], v[:, :keys], d_out[:, :queries]
    found = quick_jit(lambda *a: both_passes(kernel, *a, mask))(*arrays)
    dense = kernel._replace(name="dense")
    expected = quick_jit(lambda *a: both_passes(dense, *a, mask))(*arrays)
    for actual, truth in zip(found, expected, strict=True):
        assert relative_error(np.asarray(actual), np.asarray(truth)) < BOUNDS["float32"]


@EACH
@pytest.mark.parametrize("head_dim", [24, 80])
def test_head_dims_that_are_no_power_of_two(kernel: Kernel, head_dim: int) -> None:
    for name, error in errors(kernel.name, small(head_dim=head_dim), blocks=kernel.blocks).items():
        assert error < BOUNDS["float32"], name


@EACH
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(kernel: Kernel) -> None:
    q, k, v, d_out, _ = inputs(small())
    lonely = jnp.zeros((2, 100), jnp.int32).at[:, 33:].set(5)
    mask = AttentionMask(query_segments=lonely, key_segments=jnp.zeros((2, 100), jnp.int32))
    out, log_sum = quick_jit(lambda q, k, v: attend(kernel, q, k, v, mask))(q, k, v)
    assert not np.any(out[:, 33:])
    assert np.all(np.isneginf(log_sum[:, 33:]))
    assert np.all(np.isfinite(log_sum[:, :33]))
    _, dq, dk, dv = quick_jit(lambda *a: both_passes(kernel, *a, mask))(q, k, v, d_out)
    assert not np.any(dq[:, 33:])
    assert all(np.isfinite(x).all() and np.any(x) for x in (dq, dk, dv))


@EACH
def test_a_document_changes_no_bit_of_another(kernel: Kernel) -> None:
    q, k, v, d_out, _ = inputs(small(), batch=1)
    mask = mask_of(small(packed=True), batch=1)
    assert mask.key_segments is not None
    second = np.asarray(mask.key_segments)[..., None, None] == 2
    run = quick_jit(lambda *a: both_passes(kernel, *a, mask))
    before = run(q, k, v, d_out)
    after = run(*(jnp.where(second, 1e3 * x, x) for x in (q, k, v, d_out)))
    others = ~second[..., 0, 0]
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(was)[others], np.asarray(now)[others])
        assert not np.array_equal(np.asarray(was)[~others], np.asarray(now)[~others])


@EACH
@pytest.mark.parametrize("hidden_by", ["window", "causality", "segments"])
def test_hidden_blocks_are_not_loaded(kernel: Kernel, hidden_by: str) -> None:
    """What is poisoned there would spoil everything that reads it, since 0 * nan is nan."""
    third = 2 * kernel.smallest
    q, k, v, d_out, _ = inputs(small(length=3 * third), batch=1)
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
    out, dq, *_ = run(q, *(x.at[:, keys].set(jnp.nan) for x in (k, v)), d_out)
    assert np.isfinite(out[:, queries]).all() and np.isfinite(dq[:, queries]).all()
    assert np.isnan(out[:, keys]).any()
    poisoned = [x.at[:, queries].set(jnp.nan) for x in (q, d_out)]
    _, _, dk, dv = run(poisoned[0], k, v, poisoned[1])
    assert np.isfinite(dk[:, keys]).all() and np.isfinite(dv[:, keys]).all()
    assert np.isnan(dk[:, queries]).any()


@EACH
def test_each_device_attends_to_its_own_rows(kernel: Kernel) -> None:
    """Under `shard_map`: forward and backward."""
    case = small(window=7, packed=True)
    q, k, v, d_out, _ = inputs(case)
    mask = mask_of(case)

    def run(q: Any, k: Any, v: Any, d_out: Any, segments: Any) -> Any:
        own = replace(mask, query_segments=segments, key_segments=segments)
        return both_passes(kernel, q, k, v, d_out, own)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    # Interpreting a kernel mixes what varies over devices with what does not.
    spread = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 5, out_specs=(rows,) * 4, check_vma=False)
    arrays = q, k, v, d_out, mask.query_segments
    for found, expected in zip(quick_jit(spread)(*arrays), quick_jit(run)(*arrays), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
