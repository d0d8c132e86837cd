"""Where arrays lie on a mesh, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sealion_jax.errors import UserError
from sealion_jax.sharding import (
    MeshConfig,
    batch_sharding,
    check_batch_divides,
    check_tokens_divide,
    make_mesh,
    mesh_shape,
    microbatches_on,
    partition_spec,
    process_rows,
    to_device,
)


def test_the_free_axis_takes_what_is_left():
    assert mesh_shape(MeshConfig(data=2, fsdp=-1), 8) == {
        "data": 2,
        "fsdp": 4,
        "context": 1,
        "tensor": 1,
    }
    assert mesh_shape(MeshConfig(fsdp=-1, context=2, tensor=2), 8) == {
        "data": 1,
        "fsdp": 2,
        "context": 2,
        "tensor": 2,
    }


@pytest.mark.parametrize("config", [MeshConfig(data=3, fsdp=-1), MeshConfig(data=1, fsdp=4, tensor=1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        mesh_shape(config, 8)


def test_two_free_axes_are_refused():
    with pytest.raises(UserError, match="at most one is -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_arrays_are_split_by_their_logical_axes():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert partition_spec(("vocab", "embed"), (64, 32), mesh) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(("layers", "norm"), (2, 32), mesh) == PartitionSpec(None, None)
    # One key-value head cannot be split: every device keeps a copy.
    assert partition_spec(("embed", "kv_heads", "head_dim"), (32, 1, 8), mesh) == PartitionSpec(
        "fsdp", None, None
    )
    over_context = make_mesh(MeshConfig(fsdp=2, context=4))
    assert partition_spec(("vocab", "embed"), (64, 32), over_context) == PartitionSpec(
        None, ("fsdp", "context")
    )
    with pytest.raises(UserError, match=r"embed dimension 12 .*mesh\.fsdp=2 x mesh\.context=4"):
        partition_spec(("embed", "mlp"), (12, 64), over_context)
    with pytest.raises(
        UserError, match=r"mlp/up: its embed dimension 30 .*mesh\.fsdp=4.*sizes that do: 1, 2, 3"
    ):
        partition_spec(("embed", "mlp"), (30, 64), mesh, name="mlp/up")


def test_a_batch_that_does_not_divide_names_sizes_that_would():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    check_batch_divides(32, mesh)
    with pytest.raises(UserError, match=r"multiple of 8, .* can have 5 of them.* a batch of 16 or 24$"):
        check_batch_divides(20, mesh)
    with pytest.raises(UserError, match=r"multiple of 8, .* can have 6 of them.* a batch of 8$"):
        microbatches_on(mesh, global_batch_size=6)


@pytest.mark.parametrize(
    ("devices", "least", "rows", "parts"),
    [
        (8, 1, None, 1),
        (8, 4, None, 4),
        (8, 1, 4, 3),  # 12 rows on a device
        (4, 1, 4, 6),
        (2, 1, 4, 12),
        (8, 1, 5, 3),  # 3 parts of 4: 5 does not divide 12
        (8, 1, 12, 1),
        (8, 2, 12, 2),
        (8, 1, 1, 12),
        (8, 6, 4, 6),
        (8, 5, None, 6),  # 5 does not divide 12
        (8, 32, None, 12),  # a row at a time is the least
        (4, 32, 16, 24),
        (2, 32, None, 48),
    ],
)
def test_a_batch_takes_the_fewest_microbatches_that_keep_to_the_bounds(devices, least, rows, parts):
    mesh = make_mesh(MeshConfig(data=2, fsdp=devices // 2), jax.devices()[:devices])
    assert microbatches_on(mesh, global_batch_size=96, least=least, rows_per_device=rows) == parts


def test_tokens_of_a_row_must_divide_over_context():
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    check_tokens_divide(32, mesh)
    with pytest.raises(
        UserError, match=r"sequence_length_tokens \(30\) must be a multiple of mesh.context \(4\)"
    ):
        check_tokens_divide(30, mesh)


def test_rows_reach_the_device_that_holds_them():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = batch_sharding(mesh)
    rows = process_rows(sharding, 8)
    assert rows == list(range(8))
    batch = to_device({"tokens": np.arange(24).reshape(8, 3)}, rows, sharding, 8)
    np.testing.assert_array_equal(batch["tokens"], np.arange(24).reshape(8, 3))
    shapes = {shard.data.shape for shard in batch["tokens"].addressable_shards}
    assert shapes == {(2, 3)}
    assert len(jax.devices()) == 8
