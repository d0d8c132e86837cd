"""A compiled program's text is read right: what programs of known traffic send, and forms that TPU's has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sealion_jax.planning.collectives import collectives
from sealion_jax.planning.groups import axes_of, device_groups
from sealion_jax.planning.hlo import Array, parse

SHAPE = {"data": 2, "fsdp": 4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(mesh, function, *arguments, inputs, outputs):
    """The text of a function over the mesh's shards, compiled for eight CPU devices."""
    mapped = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(arguments, inputs, strict=True)
    ]
    return mapped.lower(*placed).compile().as_text()


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def only(found):
    (one,) = found
    return one


def test_a_gather_in_a_loop_counts_once_a_turn(mesh):
    """7 layers of weights [4, 24, 16] float32, each gathered over fsdp in a scan's body."""

    def layers(x, weights):
        def body(x, weight):
            whole = jax.lax.all_gather(weight, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole @ whole.T), None

        return jax.lax.scan(body, x, weights)[0]

    text = compiled_text(
        mesh, layers, zeros(8, 24), zeros(7, 24, 16), inputs=(P(), P(None, "fsdp")), outputs=P()
    )
    one = only(collectives(text, SHAPE))
    assert (one.kind, one.axes, one.group_size, one.executions) == ("all-gather", ("fsdp",), 4, 7)
    assert one.array_bytes == 24 * 16 * 4
    assert one.step_bytes == 7 * 24 * 16 * 4 * 3 / 4
    assert not one.at_least


def test_loops_in_loops_multiply(mesh):
    def nested(x):
        def inner(x, _):
            return jax.lax.psum(jnp.sin(x), "data"), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    one = only(collectives(compiled_text(mesh, nested, zeros(6), inputs=(P(),), outputs=P()), SHAPE))
    assert (one.kind, one.axes, one.executions) == ("all-reduce", ("data",), 15)
    assert one.step_bytes == 15 * 2 * (6 * 4) / 2  # two of them: each sends half and receives half, twice


@pytest.mark.parametrize(
    ("name", "kind", "received"),
    [
        # Of a float32 array of [16, 8], split over fsdp's four devices or whole on each.
        ("scatter", "reduce-scatter", 16 * 8 * 4 * 3 / 4),
        ("all_to_all", "all-to-all", 16 * 8 * 4 / 4 * 3 / 4),
        ("permute", "collective-permute", 16 * 8 * 4 / 4),
    ],
)
def test_each_kind_by_its_bytes(mesh, name, kind, received):
    ring = [(k, (k + 1) % 4) for k in range(4)]
    functions = {
        "scatter": functools.partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True),
        "all_to_all": functools.partial(
            jax.lax.all_to_all, axis_name="fsdp", split_axis=1, concat_axis=0, tiled=True
        ),
        "permute": functools.partial(jax.lax.ppermute, axis_name="fsdp", perm=ring),
    }
    whole = name == "scatter"
    text = compiled_text(
        mesh,
        functions[name],
        zeros(16, 8),
        inputs=(P() if whole else P("fsdp"),),
        outputs=P(None, "fsdp") if name == "all_to_all" else P("fsdp"),
    )
    one = only(collectives(text, SHAPE))
    assert (one.kind, one.axes, one.executions) == (kind, ("fsdp",), 1)
    assert one.step_bytes == received


def test_all_devices_differ_along_both_axes(mesh):
    text = compiled_text(
        mesh, lambda x: jax.lax.psum(x, ("data", "fsdp")), zeros(4), inputs=(P(),), outputs=P()
    )
    one = only(collectives(text, SHAPE))
    assert (one.axes, one.group_size) == (("data", "fsdp"), 8)


def test_a_loop_that_decides_as_it_runs_is_told(mesh):
    def until_small(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: jax.lax.psum(x, "fsdp") / 8, x)

    text = compiled_text(mesh, until_small, zeros(4), inputs=(P(),), outputs=P())
    one = only(collectives(text, SHAPE))
    assert one.executions == 1
    assert one.at_least


def test_no_collective_where_nothing_is_split(mesh):
    text = compiled_text(mesh, lambda x: x * 2, zeros(8), inputs=(P("fsdp"),), outputs=P("fsdp"))
    assert collectives(text, SHAPE) == []


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[2,4]<=[8]": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[4,2]<=[2,4]T(1,0), more": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups={}": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, use": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, use": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, use": [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ],
    "replica_groups=mesh['a'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, use": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=8] {'a':(2)2}, use": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}": [[0, 1], [2, 3]],
}


@pytest.mark.parametrize("text", GROUPS)
def test_every_way_to_write_groups(text):
    assert sorted(map(sorted, device_groups(text, 8))) == GROUPS[text]


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match=r"not understood.*V9"):
        device_groups("replica_groups=V9[3]", 8)


def test_axes_are_those_along_which_groups_differ():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    assert axes_of([[0, 1], [2, 3]], shape) == ("tensor",)
    assert axes_of([[0, 4]], shape) == ("data",)
    assert axes_of([[0, 3]], shape) == ("fsdp", "tensor")
    assert axes_of([[0]], shape) == ()


def test_bytes_of_arrays():
    assert Array("bf16", (3, 5)).num_bytes == 30
    assert Array("pred", (7,)).num_bytes == 7
    assert Array("s4", (3,)).num_bytes == 2
    assert Array("f8e4m3fn", (4,)).num_bytes == 4
    assert Array("c64", ()).num_bytes == 8


def test_text_without_an_entry_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")


# In the words of TPU's compiler, shortened: layouts, memory spaces, tuples, and comments in them.
SCATTER_FUSION = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add.1 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.4.clone.1 (input.93: bf16[64,128]) -> bf16[64,40] {
  %input.93 = bf16[64,128]{0,1:T(8,128)(2,1)} parameter(0)
  %constant.1 = bf16[] constant(0)
  %pad.1 = bf16[64,160]{0,1:T(8,128)(2,1)} pad(%input.93, %constant.1), padding=0_0x0_32
  %all-reduce.5 = bf16[64,160]{0,1:T(8,128)(2,1)} all-reduce(%pad.1), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add.1
  %zero = s32[] constant(0)
  %place = s32[] partition-id()
  ROOT %dynamic-slice.9 = bf16[64,40]{0,1:T(8,128)(2,1)} dynamic-slice(%all-reduce.5, %zero, %place), dynamic_slice_sizes={64,40}
}

ENTRY %main.1 (p: bf16[64,128]) -> bf16[64,40] {
  %p = bf16[64,128]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %fusion.1 = bf16[64,40]{0,1:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4.clone.1
}
"""  # noqa: E501

AS_ALL_REDUCE = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%keep.1 (param_0: f32[8,2], param_1: f32[8,8], param_2: s32[]) -> f32[8,2] {
  %param_0 = f32[8,2]{1,0} parameter(0)
  %param_1 = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %param_2 = s32[] parameter(2)
  %mine = f32[8,2]{1,0} dynamic-slice(%param_1, %zero, %param_2), dynamic_slice_sizes={8,2}
  ROOT %kept = f32[8,2]{1,0} add(%param_0, %mine)
}

ENTRY %main.1 (part: f32[2,16], gradient: f32[8,8], held: f32[8,2], place: s32[]) -> (f32[8,16], f32[8,2], f32[4]) {
  %part = f32[2,16]{1,0} parameter(0)
  %gradient = f32[8,8]{1,0} parameter(1)
  %held = f32[8,2]{1,0} parameter(2)
  %place = s32[]{:T(128)S(6)} parameter(3)
  %zero = s32[] constant(0)
  %nothing = f32[] constant(0)
  %empty = f32[8,16]{1,0} broadcast(%nothing), dimensions={}
  %norms = f32[4]{0} iota(), iota_dimension=0
  %filled = f32[8,16]{1,0} dynamic-update-slice(%empty, %part, %place, %zero)
  %all-reduce.1 = (f32[8,16]{1,0}, f32[8,8]{1,0}, /*index=2*/f32[4]{0}) all-reduce(%filled, %gradient, %norms), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add.1, metadata={op_name="jit(f)/while/body/dot"}
  %whole = f32[8,16]{1,0} get-tuple-element(%all-reduce.1), index=0
  %summed = f32[8,8]{1,0} get-tuple-element(%all-reduce.1), index=1
  %all-norms = f32[4]{0} get-tuple-element(%all-reduce.1), index=2
  %kept = f32[8,2]{1,0} fusion(%held, %summed, %place), kind=kLoop, calls=%keep.1
  ROOT %tuple = (f32[8,16]{1,0}, f32[8,2]{1,0}, f32[4]{0}) tuple(%whole, %kept, %all-norms)
}
"""  # noqa: E501

CHAIN = """HloModule jit_f, is_scheduled=true, num_partitions=4

%start.1 (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="51"}
  ROOT %begin = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside.1 (p: bf16[2,8], x: f32[16]) -> f32[16] {
  %p = bf16[2,8]{1,0} parameter(0)
  %x = f32[16]{0} parameter(1)
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="51"}
  ROOT %twice = f32[16]{0} add(%x, %x)
}

ENTRY %main.1 (p: bf16[2,8], x: f32[16]) -> f32[16] {
  %p = bf16[2,8]{1,0} parameter(0)
  %x = f32[16]{0} parameter(1)
  %async-collective-start.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%p), kind=kCustom, calls=%start.1
  ROOT %twice.1 = f32[16]{0} fusion(%p, %x), kind=kCustom, calls=%beside.1
}
"""  # noqa: E501

SLICES = """HloModule jit_f, is_scheduled=true, num_partitions=4

ENTRY %main.1 (p: f32[6,8,128]) -> f32[6,8,128] {
  %p = f32[6,8,128]{2,1,0} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (f32[6,8,128]{2,1,0}, u32[], token[]) send(%p, %after-all.1), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.4_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[6,8,128]{2,1,0}, u32[], token[]) recv(%after-all.1), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.4_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done.1 = (f32[6,8,128]{2,1,0}, token[]) recv-done(%recv.1), channel_id=4, is_host_transfer=true
  ROOT %out = f32[6,8,128]{2,1,0} get-tuple-element(%recv-done.1), index=0
}
"""  # noqa: E501


def test_a_scatter_that_is_a_fusion():
    """It pads its input to even parts for the chip; what is sent is what is reduced."""
    one = only(collectives(SCATTER_FUSION, {"fsdp": 4}))
    assert (one.kind, one.opcode) == ("reduce-scatter", "all-reduce-scatter")
    assert one.step_bytes == 64 * 160 * 2 * 3 / 4


def test_one_all_reduce_that_gathers_and_scatters_and_reduces():
    found = {one.kind: one for one in collectives(AS_ALL_REDUCE, {"fsdp": 4})}
    assert {kind: one.arrays for kind, one in found.items()} == {
        "all-gather": (Array("f32", (8, 16)),),
        "reduce-scatter": (Array("f32", (8, 8)),),
        "all-reduce": (Array("f32", (4,)),),
    }
    assert {one.opcode for one in found.values()} == {"all-reduce"}
    assert found["all-gather"].op_name == "jit(f)/while/body/dot"
    assert sum(one.step_bytes for one in found.values()) == (8 * 16 + 8 * 8 + 2 * 4) * 4 * 3 / 4


def test_of_many_arrays_the_tenth_is_not_the_first():
    text = AS_ALL_REDUCE.replace("(%all-reduce.1), index=2", "(%all-reduce.1), index=10")
    kinds = {one.kind: one.arrays for one in collectives(text, {"fsdp": 4})}
    assert kinds["reduce-scatter"] == (Array("f32", (8, 8)),)


def test_an_all_reduce_of_what_is_used_whole_stays_one():
    text = AS_ALL_REDUCE.replace("tuple(%whole, %kept, %all-norms)", "tuple(%whole, %summed, %all-norms)")
    kinds = {one.kind: one.arrays for one in collectives(text, {"fsdp": 4})}
    assert kinds["all-reduce"] == (Array("f32", (8, 8)), Array("f32", (4,)))
    assert "reduce-scatter" not in kinds


def test_a_collective_that_runs_beside_others_counts_once():
    one = only(collectives(CHAIN, {"fsdp": 4}))
    assert (one.kind, one.executions, one.step_bytes) == ("all-gather", 1, 8 * 8 * 2 * 3 / 4)


def test_what_slices_send_to_each_other():
    one = only(collectives(SLICES, {"data": 2, "fsdp": 4}))
    assert (one.kind, one.axes, one.group_size) == ("all-reduce", ("data",), 2)
    assert one.step_bytes == 6 * 8 * 128 * 4
    assert np.array_equal(one.groups, [[0, 4], [1, 5], [2, 6], [3, 7]])
