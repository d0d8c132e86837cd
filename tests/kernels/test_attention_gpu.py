"""What is the GPU kernels' own: stretches without a mask, lowering for CUDA without a GPU, the table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SCALE, Case, mask_of, pairwise
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from test_attention_kernels import GPU, TPU

from sealion_kernels import AttentionMask, Target, flash_attention
from sealion_kernels.block_table import AttentionBlocks, attention_blocks
from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu.stretches import key_stretches, query_stretches, wholly_seen
from sealion_kernels.gpu_blocks import GpuBlockSizes, tiles

ON_CPU = Target(platform="cpu", kind="cpu")
H100 = Target(platform="gpu", kind="NVIDIA H100 80GB HBM3")
A100 = Target(platform="gpu", kind="NVIDIA A100-SXM4-80GB")


def attend(q: Any, k: Any, v: Any, mask: AttentionMask, blocks: AttentionBlocks | None = None) -> Any:
    return flash_attention(
        q, k, v, mask=mask, scale=SCALE, implementation="gpu", target=ON_CPU, blocks=blocks
    )


@pytest.mark.parametrize("case", pairwise()[::3], ids=str)
def test_stretches_hold_what_meets_and_leave_the_mask_out_only_where_it_shows_all(case: Case) -> None:
    mask, L = mask_of(case), case.length
    sizes = BlockSizes(query=16, key=32)
    seen = np.zeros((2, -(-L // 16) * 16, -(-L // 32) * 32), bool)
    seen[:, :L, :L] = mask.dense(L, L)
    tiled = seen.reshape(2, -1, 16, seen.shape[2] // 32, 32)
    for stretches, some, every in (
        (key_stretches(mask, L, L, sizes), tiled.any((2, 4)), tiled.all((2, 4))),
        (
            query_stretches(mask, L, L, sizes),
            tiled.any((2, 4)).swapaxes(1, 2),
            tiled.all((2, 4)).swapaxes(1, 2),
        ),
    ):
        index = np.arange(some.shape[2])
        start, first, after, stop = (np.asarray(stretches.bounds)[..., i, None] for i in range(4))
        assert np.all((start <= first) & (first <= after) & (after <= stop))
        assert not np.any(some & ~((index >= start) & (index < stop)))
        unmasked = (index >= first) & (index < after)
        full_rows = np.ones(
            1, bool
        )  # the last block of the side that stays may be short: its end is not stored
        if L % (16 if some.shape[1] == tiled.shape[1] else 32):
            full_rows = np.arange(some.shape[1]) < some.shape[1] - 1
        assert not np.any(unmasked & ~every & np.reshape(full_rows, (-1, 1)))
        assert stretches.before or not np.any(first > start)
        assert stretches.after or not np.any(stop > after)


def test_most_of_a_long_causal_row_needs_no_mask() -> None:
    sizes = BlockSizes(query=128, key=128)
    whole = np.asarray(wholly_seen(AttentionMask(), 4096, 4096, sizes))
    assert whole.sum() == 32 * 31 / 2
    local = np.asarray(wholly_seen(AttentionMask(window=1024), 4096, 4096, sizes))
    assert local.sum(-1).max() == 7  # of nine that are met: the diagonal and the window's edge need it


def lowered(
    queries: int, keys: int, heads: tuple[int, int], head_dim: int, dtype: str, target: Target, **mask: Any
) -> str:
    """StableHLO for CUDA of forward and backward, as exported; the mask's arrays are arguments."""
    q = jax.ShapeDtypeStruct((2, queries, heads[0], head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, keys, heads[1], head_dim), dtype)
    ids = {
        f"{side}_{name}": jax.ShapeDtypeStruct((2, length), jnp.int32)
        for name in mask.pop("ids", ())
        for side, length in (("query", queries), ("key", keys))
    }

    def run(q: Any, k: Any, v: Any, ids: dict[str, Any]) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(
                q,
                k,
                v,
                mask=AttentionMask(**mask, **ids),
                scale=SCALE,
                implementation="gpu",
                target=target,
                return_log_sum=True,
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(out)

    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with described(target):
        exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)(q, k, k, ids)
    return exported.mlir_module()


def described(target: Target) -> Any:
    """A context in which JAX lowers for a GPU that is not here; since 0.12 it asks which one."""
    device = AbstractDevice(device_kind=target.kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("gpu",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "head_dim", "dtype", "mask"),
    [
        (2048, 2048, (4, 1), 256, "bfloat16", {}),
        (2048, 2048, (8, 4), 256, "bfloat16", {"window": 512, "ids": ("segments",)}),
        (1000, 1000, (16, 2), 128, "bfloat16", {"window": 1024, "ids": ("segments", "spans")}),
        (1000, 1000, (4, 4), 64, "float32", {"causal": False, "window": 7}),
        (3, 1000, (4, 1), 128, "float32", {"query_offset": 997}),
        (300, 300, (4, 1), 256, "float32", {"ids": ("spans",)}),
        (100, 100, (2, 2), 80, "float16", {"causal": False}),
        (5, 5, (2, 1), 64, "bfloat16", {"window": 1}),
    ],
)
@pytest.mark.parametrize("target", [H100, A100], ids=["H100", "A100"])
def test_lowers_for_cuda_without_a_gpu(
    queries: int, keys: int, heads: tuple[int, int], head_dim: int, dtype: str, mask: dict, target: Target
) -> None:
    text = lowered(queries, keys, heads, head_dim, dtype, target, **mask)
    kernels = [text.count(f'name = "attention_{name}"') for name in KERNELS]
    assert kernels == [1, 1, 1]
    # No array of scores: nothing is as large as queries times keys.
    assert queries < 1000 or f"{queries}x{keys}x" not in text


KERNELS = ("forward", "backward_queries", "backward_keys")


def test_lowers_for_cuda_inside_shard_map() -> None:
    """With JAX's check of what varies over the devices; on GPUs that are only described."""
    device = AbstractDevice(device_kind=H100.kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    rows = PartitionSpec("data")

    def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = AttentionMask(window=7, query_segments=ids, key_segments=ids)
        return flash_attention(q, k, v, mask=mask, scale=SCALE, implementation="gpu", target=H100)

    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: loss(q, k, v, ids), q, k, v)
        return vjp(out)

    spread = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows,) * 3)
    q, ids = (
        jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 256), jnp.int32),
    )
    text = jax.jit(spread).trace(q, q, q, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert [text.count(f'name = "attention_{name}"') for name in KERNELS] == [1, 1, 1]


def shared_memory(which: str, sizes: BlockSizes, head_dim: int, itemsize: int) -> int:
    """Bytes that a kernel takes, by the rule that `gpu_blocks` states; without tensor cores more."""
    stages = sizes.num_stages if isinstance(sizes, GpuBlockSizes) else GpuBlockSizes.num_stages
    query, key = sizes.query * head_dim * itemsize, sizes.key * head_dim * itemsize
    scores = sizes.query * sizes.key * itemsize if itemsize > 2 else 0
    return {
        "forward": query + stages * 2 * key + scores,
        "backward": 2 * key + stages * 2 * query + 2 * scores,
        "backward_queries": 2 * query + stages * 2 * key,
    }[which]


PASSES = ("forward", "backward", "backward_queries")


@pytest.mark.parametrize(
    ("target", "kib"), [(H100, 227), (A100, 163), (Target(platform="gpu", kind="unknown"), 99)], ids=str
)
@pytest.mark.parametrize("itemsize", [2, 4], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_the_table_gives_fits_shared_memory(
    target: Target, kib: int, itemsize: int, head_dim: int
) -> None:
    for length in (100, 300, 8192):
        blocks = attention_blocks(
            "gpu",
            target,
            num_queries=length,
            num_keys=length,
            window=None,
            head_dim=head_dim,
            group=2,
            itemsize=itemsize,
        )
        for which in PASSES:
            needed = shared_memory(which, getattr(blocks, which), head_dim, itemsize)
            assert needed <= (kib - 1) << 10, which


def test_the_rule_of_shared_memory_gives_what_compiling_the_kernels_gave() -> None:
    """Within a KiB; and the blocks of the other tests, which are interpreted, would not fit."""
    for (head_dim, itemsize), compiled in {
        (64, 2): (65, 49, 49),
        (128, 2): (129, 97, 97),
        (256, 2): (192, 128, 192),
    }.items():
        blocks = attention_blocks(
            "gpu",
            H100,
            num_queries=8192,
            num_keys=8192,
            window=None,
            head_dim=head_dim,
            group=2,
            itemsize=itemsize,
        )
        for which, kib in zip(PASSES, compiled, strict=True):
            assert 0 <= kib - shared_memory(which, getattr(blocks, which), head_dim, itemsize) / 1024 <= 1
    odd = [shared_memory(which, getattr(GPU.odd_blocks, which), 256, 2) >> 10 for which in PASSES]
    assert odd[:2] == [288, 320] and min(odd[:2]) > 227


def test_compiled_kernels_are_tested_with_the_blocks_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GPU.blocks is GPU.odd_blocks
    monkeypatch.setattr(Target, "here", lambda: H100)
    assert GPU.blocks is None and TPU.blocks is TPU.odd_blocks


def test_the_table_has_tiles_for_every_shape() -> None:
    for target in (H100, A100, Target(platform="gpu", kind="unknown")):
        for head_dim in (16, 64, 72, 128, 256):
            for itemsize in (2, 4):
                found = tiles(target, num_queries=40, num_keys=5000, head_dim=head_dim, itemsize=itemsize)
                for sizes in (found.forward, found.keys, found.queries):
                    assert sizes.query <= 64 and sizes.key >= 16
    blocks = attention_blocks(
        "gpu", H100, num_queries=8192, num_keys=8192, window=None, head_dim=256, group=4
    )
    assert isinstance(blocks.forward, GpuBlockSizes) and blocks.backward_queries is not None


def test_what_it_cannot_do_is_refused() -> None:
    q = jnp.zeros((1, 8, 2, 64))
    with pytest.raises(
        ValueError, match="attention implementation 'gpu' takes queries and keys of one dtype"
    ):
        attend(q, q.astype(jnp.bfloat16), q.astype(jnp.bfloat16), AttentionMask())
    large = jnp.zeros((1, 8, 2, 512))
    with pytest.raises(ValueError, match="takes head dims up to 256, not 512"):
        attend(large, large, large, AttentionMask())
    odd = BlockSizes(query=48, key=32)
    with pytest.raises(ValueError, match="powers of two from 16 on, not 48"):
        attend(q, q, q, AttentionMask(), AttentionBlocks(forward=odd, backward=odd))
