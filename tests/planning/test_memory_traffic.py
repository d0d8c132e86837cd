"""Bytes that a program moves to and from memory, of programs small enough to count."""

from __future__ import annotations

from sealion_jax.planning.hlo import parse
from sealion_jax.planning.memory_traffic import memory_bytes

PLAIN = """HloModule jit_f

ENTRY %main.1 (a: f32[10,6], b: f32[10,6]) -> f32[10,6] {
  %a = f32[10,6]{1,0:T(8,128)} parameter(0)
  %b = f32[10,6]{1,0:T(8,128)} parameter(1)
  %near = f32[10,6]{1,0:T(8,128)S(1)} add(%a, %b)
  ROOT %far = f32[10,6]{1,0:T(8,128)} multiply(%near, %near)
}
"""

LOOP = """HloModule jit_f

%weight.1 (stack.0: f32[5,8,8], at.0: s32[]) -> bf16[8,8] {
  %stack.0 = f32[5,8,8]{2,1,0} parameter(0)
  %at.0 = s32[] parameter(1)
  %zero.0 = s32[] constant(0)
  %same.0 = f32[5,8,8]{2,1,0} bitcast(%stack.0)
  %weight = f32[1,8,8]{2,1,0} dynamic-slice(%same.0, %at.0, %zero.0, %zero.0), dynamic_slice_sizes={1,8,8}
  ROOT %narrow.0 = bf16[8,8]{1,0} convert(%weight)
}

%layer.1 (x.1: bf16[4,8], stack.1: f32[5,8,8], at.1: s32[]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %stack.1 = f32[5,8,8]{2,1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %narrow = bf16[8,8]{1,0} fusion(%stack.1, %at.1), kind=kLoop, calls=%weight.1
  ROOT %out.1 = bf16[4,8]{1,0} dot(%x.1, %narrow), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%keep.1 (kept.1: bf16[5,4,8], x.2: bf16[4,8], at.2: s32[]) -> bf16[5,4,8] {
  %kept.1 = bf16[5,4,8]{2,1,0} parameter(0)
  %x.2 = bf16[4,8]{1,0} parameter(1)
  %at.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %row = bf16[1,4,8]{2,1,0} reshape(%x.2)
  %put = bf16[5,4,8]{2,1,0} dynamic-update-slice(%kept.1, %row, %at.2, %zero.2, %zero.2)
  ROOT %same.1 = bf16[5,4,8]{2,1,0} bitcast(%put)
}

%body.1 (carried: (s32[], bf16[4,8], f32[5,8,8], bf16[5,4,8])) -> (s32[], bf16[4,8], f32[5,8,8], bf16[5,4,8]) {
  %carried = (s32[], bf16[4,8]{1,0}, f32[5,8,8]{2,1,0}, /*index=3*/bf16[5,4,8]{2,1,0}) parameter(0)
  %at = s32[]{:T(128)S(6)} get-tuple-element(%carried), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%carried), index=1
  %stack = f32[5,8,8]{2,1,0} get-tuple-element(%carried), index=2
  %kept = bf16[5,4,8]{2,1,0} get-tuple-element(%carried), index=3
  %out = bf16[4,8]{1,0} fusion(%x, %stack, %at), kind=kOutput, calls=%layer.1
  %kept.9 = bf16[5,4,8]{2,1,0} fusion(%kept, %x, %at), kind=kLoop, calls=%keep.1
  ROOT %next = (s32[], bf16[4,8]{1,0}, f32[5,8,8]{2,1,0}, bf16[5,4,8]{2,1,0}) tuple(%at, %out, %stack, %kept.9)
}

%condition.1 (carried.2: (s32[], bf16[4,8], f32[5,8,8], bf16[5,4,8])) -> pred[] {
  %carried.2 = (s32[], bf16[4,8]{1,0}, f32[5,8,8]{2,1,0}, bf16[5,4,8]{2,1,0}) parameter(0)
  %at.3 = s32[] get-tuple-element(%carried.2), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[]{:S(6)} compare(%at.3, %five), direction=LT
}

ENTRY %main.1 (given: (s32[], bf16[4,8], f32[5,8,8], bf16[5,4,8])) -> (s32[], bf16[4,8], f32[5,8,8], bf16[5,4,8]) {
  %given = (s32[], bf16[4,8]{1,0}, f32[5,8,8]{2,1,0}, bf16[5,4,8]{2,1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[4,8]{1,0}, f32[5,8,8]{2,1,0}, bf16[5,4,8]{2,1,0}) while(%given), condition=%condition.1, body=%body.1
}
"""  # noqa: E501


def test_operands_are_read_and_results_written_but_for_those_near_the_core():
    assert memory_bytes(parse(PLAIN)) == 2 * 240 + 240


def test_a_stack_that_is_read_whole_counts_whole():
    """Where one user of the stack takes a layer, and another all of it."""
    text = LOOP.replace(
        "  ROOT %narrow.0 = bf16[8,8]{1,0} convert(%weight)",
        "  %all.0 = f32[5,8,8]{2,1,0} negate(%stack.0)\n  ROOT %narrow.0 = bf16[8,8]{1,0} convert(%weight)",
    )
    assert memory_bytes(parse(text)) - memory_bytes(parse(LOOP)) == 5 * 4 * 8 * 8 * 4


def test_a_loop_reads_each_layers_weights_and_writes_what_it_keeps():
    """Each of five turns reads a layer of the stack, not all of it, and puts a row into what is kept."""
    layer = 4 * 8 * 2 + 8 * 8 * 4 + 4 * 8 * 2
    keep = 4 * 8 * 2 + 4 * 8 * 2
    assert memory_bytes(parse(LOOP)) == 5 * (layer + keep)
