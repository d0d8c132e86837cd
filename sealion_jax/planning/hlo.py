"""A compiled program's text, read: its computations, their instructions, and how often each is executed.

XLA prints a program as computations, one of them the entry, each a list of instructions

    %name = f32[8,128]{1,0:T(8,128)} opcode(%operand, ...), attribute=..., calls=%computation, ...

What is taken from it: names, opcodes, arrays (dtype and shape, a device's own part), operands, and the
computations that an instruction calls. Layouts are skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{"n"\s*:\s*"?(\d+)')
_CONSTANT = re.compile(r"constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

PASSED_ON = ("bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "transpose")
"""Opcodes whose result is their operand, stored or written in another way."""


class Array(NamedTuple):
    """An array that a program names; compiled, it is a device's part."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """As it is sent: without a layout's padding."""
        return math.ceil(self.elements * bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def bits(dtype: str) -> int:
    """Of one element of a dtype, by the name that XLA gives it; 0 for a token, which is no data."""
    if dtype == "token":
        return 0
    found = _BITS.match(dtype)
    if found is None:
        return 8  # pred
    return int(found[1])


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """Its result: several of a tuple."""
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """Computations that it executes."""
    text: str
    """The whole line."""

    @property
    def is_root(self) -> bool:
        """Whether it gives its computation's result."""
        return self.text.lstrip().startswith("ROOT ")

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from; empty where the compiler has lost it."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""


@dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    header: str = ""
    """The first line: of the whole module."""

    def __iter__(self) -> Iterator[tuple[str, Instruction]]:
        """(name of its computation, instruction), all of them."""
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                yield name, instruction

    def executions(self) -> dict[str, int]:
        """How often each computation is executed when the program is, loops counted by their trips.

        Both branches of a conditional count as executed: what is told is then too much, never too little.

        Raises:
            ValueError: the calls form a circle, which no program of XLA's does.
        """
        order: list[str] = []
        seen: dict[str, bool] = {}

        def visit(name: str) -> None:
            if seen.get(name) is False:
                raise ValueError(f"computation {name} calls itself; this is not the text of an XLA program")
            if name in seen:
                return
            seen[name] = False
            for instruction in self.computations[name].values():
                for called in instruction.called:
                    visit(called)
            seen[name] = True
            order.append(name)

        visit(self.entry)
        counts = dict.fromkeys(order, 0)
        counts[self.entry] = 1
        for name in reversed(order):  # callers before those that they call
            for instruction in self.computations[name].values():
                times = self.trips(name, instruction) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    counts[called] += counts[name] * (1 if times is None else times)
        return counts

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None where it is decided only as the program runs.

        The compiler's own count where the text has it. Else the constant that the condition compares the
        counter with, be it written in the condition or handed in with what the loop carries; the counters
        of JAX's scans begin with 0 and go up by 1.
        """
        if found := _TRIPS.search(loop.text):
            return int(found[1])
        condition_name = re.search(r"\bcondition=%?([\w.\-]+)", loop.text)
        if condition_name is None or condition_name[1] not in self.computations:
            return None
        condition = self.computations[condition_name[1]]
        limits = [
            self._constant(condition, operand, computation, loop)
            for instruction in condition.values()
            if instruction.opcode == "compare" and "direction=LT" in instruction.text
            for operand in instruction.operands[1:2]
        ]
        if not limits:  # the comparison is inside of a fusion
            limits = [int(found[1]) for line in condition.values() if (found := _CONSTANT.search(line.text))]
        return limits[0] if len(limits) == 1 else None

    def _constant(
        self, condition: Mapping[str, Instruction], name: str, computation: str, loop: Instruction
    ) -> int | None:
        """The value of a condition's operand, if it is a constant there or in what the loop is given."""
        line = condition.get(name)
        if line is None:
            return None
        if line.opcode == "get-tuple-element":
            place = re.search(r"index=(\d+)", line.text)
            caller = self.computations[computation]
            carried = caller.get(loop.operands[0]) if loop.operands else None
            if place is None or carried is None or carried.opcode != "tuple":
                return None
            line = caller.get(carried.operands[int(place[1])])
        while line is not None and line.opcode == "copy":
            line = self.computations[computation].get(line.operands[0])
        found = None if line is None or line.opcode != "constant" else _CONSTANT.search(line.text)
        return None if found is None else int(found[1])


def parse(text: str) -> Program:
    """The program that `Compiled.as_text()` gives.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if not line[:1].isspace():
            header = _HEADER.match(line)
            current = None
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Program(computations, entry, header=text[: text.index("\n")])


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if named is None:
        return None
    end = _end_of_shape(line, named.end())
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    attributes = line[close:]
    called = _CALLED.findall(attributes)
    for several in _CALLED_LIST.findall(attributes):
        called += re.findall(r"%?([\w.\-]+)", several)
    return Instruction(
        name=named[1],
        opcode=opcode[1],
        arrays=arrays(line[named.end() : end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", line[opcode.end() : close])),
        called=tuple(dict.fromkeys(called)),
        text=line,
    )


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays that a piece of text names, such as the shape of a result."""
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _end_of_shape(line: str, start: int) -> int:
    """Where a result's shape ends: a tuple's at its last bracket, an array's at the next space."""
    return _closing(line, start) if line[start] == "(" else line.index(" ", start)


def _closing(line: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`; the line's end if none does."""
    depth = 0
    for place in range(start, len(line)):
        if line[place] == "(":
            depth += 1
        elif line[place] == ")":
            depth -= 1
            if depth == 0:
                return place + 1
    return len(line)
