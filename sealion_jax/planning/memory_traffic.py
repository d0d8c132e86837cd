"""How many bytes a compiled program moves to and from a device's memory, from its text."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sealion_jax.planning.hlo import PASSED_ON, Instruction, Program, arrays

_NOTHING_MOVES = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "domain"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
    *("async-start", "async-update", "async-done", "copy-done", "all-gather-done", "all-reduce-done"),
    *("collective-permute-done", "send-done", "recv-done"),
)
_ELSEWHERE = re.compile(r"[a-z]+\d*\w*\[[0-9,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")
"""An array that the compiler has put into a memory of the chip's core and not into the large one."""


def memory_bytes(program: Program) -> float:
    """Read and written in a run of the program, by one device.

    Each instruction reads its operands and writes its result once; what a fusion keeps inside does not move.
    A slice reads what it takes, an update writes what it puts in, also as the beginning or the end of a
    fusion. Arrays that the compiler placed in the core's own memory do not count.
    """
    executions = program.executions()
    inside = {
        called
        for _, line in program
        if line.opcode not in ("while", "conditional", "call", "async-start")
        for called in line.called
    }
    total = 0.0
    for computation, count in executions.items():
        if computation not in inside and count:
            lines = program.computations[computation]
            total += count * sum(_moved(line, lines, program) for line in lines.values())
    return total


def _moved(line: Instruction, lines: Mapping[str, Instruction], program: Program) -> float:
    if line.opcode in _NOTHING_MOVES:
        return 0.0
    operands = [lines[name] for name in line.operands if name in lines]
    if line.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _stored(line)
    if line.opcode in ("dynamic-update-slice", "scatter"):
        place = 1 if line.opcode == "dynamic-update-slice" else len(operands) - 1
        return 2 * _stored(operands[place]) if place < len(operands) else 0.0
    if line.opcode == "copy-start":
        return _stored(line)  # a tuple of what is written and what is read
    if line.opcode == "fusion" and line.called and line.called[0] in program.computations:
        return _moved_by_fusion(line, operands, program)
    return _stored(line) + sum(map(_stored, operands))


def _moved_by_fusion(line: Instruction, operands: list[Instruction], program: Program) -> float:
    """What a fusion reads of its operands, and what it writes."""
    inner = line.called[0]
    moved = 0.0
    for place, operand in enumerate(operands):
        stored = _stored(operand)
        if stored:
            moved += min(stored, _read(program, inner, _parameter(program, inner, place), stored))
    root = next((one for one in program.computations[inner].values() if one.is_root), None)
    written = _bytes(line) if root is None else _written(program, inner, root)
    return moved + min(_stored(line), written)


def _parameter(program: Program, computation: str, place: int) -> str | None:
    """The name of a computation's parameter, by its number."""
    for name, line in program.computations[computation].items():
        if line.opcode == "parameter" and f" parameter({place})" in line.text:
            return name
    return None


def _read(program: Program, computation: str, name: str | None, whole: float) -> float:
    """Bytes that are read of a value inside of a fusion: where all who use it slice it, what they take."""
    lines = program.computations[computation]
    read = 0.0
    for user in (line for line in lines.values() if name in line.operands):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            read += _bytes(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            read += 0.0  # what is updated in place is not read
        elif user.opcode in PASSED_ON and not user.is_root:
            read += _read(program, computation, user.name, whole)
        elif user.opcode == "fusion" and user.called:
            for place in (k for k, operand in enumerate(user.operands) if operand == name):
                inner = user.called[0]
                read += _read(program, inner, _parameter(program, inner, place), whole)
        else:
            return whole
    return min(read, whole)


def _written(program: Program, computation: str, line: Instruction) -> float:
    """Bytes that a fusion writes of a result: where it is an update in place, what it puts in."""
    lines = program.computations[computation]
    if line.opcode == "tuple":
        return sum(_written(program, computation, lines[name]) for name in line.operands if name in lines)
    if line.opcode == "dynamic-update-slice" and line.operands[1] in lines:
        return _bytes(lines[line.operands[1]])
    if line.opcode in PASSED_ON and line.operands[0] in lines:
        return min(_bytes(line), _written(program, computation, lines[line.operands[0]]))
    if line.opcode == "fusion" and line.called:
        inner = program.computations[line.called[0]]
        root = next((one for one in inner.values() if one.is_root), None)
        if root is not None:
            return min(_bytes(line), _written(program, line.called[0], root))
    return _bytes(line)


def _bytes(line: Instruction) -> float:
    """Of a result; scalars are kept by the core."""
    return sum(array.num_bytes for array in line.arrays if array.shape)


def _stored(line: Instruction) -> float:
    """Bytes of a result that lie in the device's large memory."""
    shape = line.text[: line.text.find(f" {line.opcode}(")]
    elsewhere = len(_ELSEWHERE.findall(shape))
    if not elsewhere:
        return _bytes(line)
    if elsewhere >= len(line.arrays):
        return 0.0
    near = (array for text in _ELSEWHERE.findall(shape) for array in arrays(text))
    return _bytes(line) - sum(array.num_bytes for array in near if array.shape)
