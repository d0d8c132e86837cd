"""What a compiled program sends between devices: each collective, how often, over which axes, how many bytes.

Bytes are those that one device receives, whatever way they take. With n devices in a group, and with the
whole array (the gathered one, the one that is reduced) of so many bytes:

    all-gather            (n - 1) / n of the whole
    reduce-scatter        (n - 1) / n of the whole
    all-reduce            twice that: a reduce-scatter and an all-gather
    all-to-all            (n - 1) / n of what a device holds
    collective-permute    what a device sends

Compilers write a collective in other words where it suits them. TPU's writes a reduce-scatter as a fusion
`all-reduce-scatter` (an all-reduce and the slice of it that stays), and on large slices a gather as the
all-reduce of arrays in which each device has filled in its part alone. Such are told as what they do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sealion_jax.planning.groups import Groups, axes_of, device_groups
from sealion_jax.planning.hlo import PASSED_ON, Array, Instruction, Program, parse

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OPCODES: Mapping[str, Kind] = {
    **{kind: kind for kind in KINDS},
    **{f"{kind}-start": kind for kind in KINDS},
    "ragged-all-to-all": "all-to-all",
    "collective-broadcast": "collective-permute",
}

TRANSFERS: Mapping[str, Kind] = {kind.upper().replace("-", "_"): kind for kind in KINDS}
"""Of slices, by the name that the runtime between them has for it; others are one to one."""

_PADDING = 1.25
"""A part, times the number of parts, may be larger than the whole by this: TPU's compiler rounds parts up."""
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)",_xla_megascale')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')

Lines = Mapping[str, Instruction]
"""Of a computation, by name."""


def received_share(kind: Kind, devices: int) -> float:
    """What one device receives, over the whole array."""
    others = (devices - 1) / devices
    return {"all-reduce": 2 * others, "collective-permute": 1.0}.get(kind, others)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a compiled program."""

    kind: Kind
    """What it does."""
    opcode: str
    """What the program calls it."""
    arrays: tuple[Array, ...]
    """The whole arrays: gathered ones, those that are reduced, or a device's part that is sent."""
    groups: Groups
    axes: tuple[str, ...]
    """Of the mesh, along which the devices of a group differ."""
    executions: int
    """In a run of the program."""
    at_least: bool
    """In a loop that decides as it runs how often it does: `executions` counts its body once."""
    op_name: str
    computation: str

    @property
    def array_bytes(self) -> int:
        """Of the whole arrays, of one execution."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def group_size(self) -> int:
        """Devices that take part together."""
        return max(map(len, self.groups))

    @property
    def received_bytes(self) -> float:
        """By one device in one execution."""
        return received_share(self.kind, self.group_size) * self.array_bytes

    @property
    def step_bytes(self) -> float:
        """Received by one device in a run of the program."""
        return self.received_bytes * self.executions


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a compiled program that joins more than one device.

    Args:
        text: of `Compiled.as_text()`.
        mesh_shape: devices along each axis, in the mesh's order.

    Raises:
        ValueError: groups of devices are written in a way that is not known here.
    """
    program = parse(text)
    executions = program.executions()
    endless = _in_endless_loops(program)
    scattering = _called_by_fusions(program, "all-reduce-scatter")
    found = []
    for computation, line in program:
        if line.opcode not in OPCODES or computation not in executions:
            continue
        groups = device_groups(line.text, math.prod(mesh_shape.values()))
        if max(map(len, groups)) < 2 or _goes_on(program, computation, line):
            continue
        if computation in scattering:
            does: dict[Kind, tuple[Array, ...]] = {
                "reduce-scatter": _whole(line, program.computations[computation])
            }
        elif line.opcode == "all-reduce":
            does = _really(program, computation, line, max(map(len, groups)))
        else:
            does = {OPCODES[line.opcode]: _whole(line, program.computations[computation])}
        found += [
            Collective(
                kind=kind,
                opcode="all-reduce-scatter" if computation in scattering else line.opcode,
                arrays=arrays,
                groups=groups,
                axes=axes_of(groups, mesh_shape),
                executions=executions[computation],
                at_least=computation in endless,
                op_name=line.op_name,
                computation=computation,
            )
            for kind, arrays in does.items()
        ]
    return found + _between_slices(program, mesh_shape, executions, endless)


def _called_by_fusions(program: Program, beginning: str) -> set[str]:
    """The computations with such a name that fusions call."""
    fusions = (line for _, line in program if line.opcode == "fusion")
    return {called for line in fusions for called in line.called if called.startswith(beginning)}


def _goes_on(program: Program, computation: str, line: Instruction) -> bool:
    """Whether it is a collective that was started before, and goes on beside the computation that it is in.

    TPU's compiler runs a collective during several fusions. Each names it anew, in a chain that begins with
    the custom call AsyncCollectiveStart.
    """
    if "chain_id=" not in line.text:
        return False
    lines = program.computations[computation].values()
    return not any('custom_call_target="AsyncCollectiveStart"' in other.text for other in lines)


def _between_slices(
    program: Program, mesh_shape: Mapping[str, int], executions: Mapping[str, int], endless: Container[str]
) -> list[Collective]:
    """What slices send to each other, which a program for several of them does by sends to their hosts.

    Such a program is one slice's. Slices are outermost in the mesh, so equal places in them join.
    """
    num_devices = math.prod(mesh_shape.values())
    partitions = re.search(r"num_partitions=(\d+)", program.header)
    a_slice = int(partitions[1]) if partitions else num_devices
    groups = [list(range(first, num_devices, a_slice)) for first in range(a_slice)]
    transfers: dict[str, dict[str, tuple[str, Instruction]]] = {}
    for computation, line in program:
        if (
            line.opcode in ("send", "recv")
            and computation in executions
            and (name := _RENDEZVOUS.search(line.text))
        ):
            transfers.setdefault(name[1], {})[line.opcode] = (computation, line)
    found = []
    for transfer in transfers.values():
        computation, line = transfer.get("recv") or transfer["send"]
        kind = _TRANSFER.search(line.text)
        if kind is None:
            continue
        whole = max((one.arrays[0] for _, one in transfer.values()), key=lambda array: array.num_bytes)
        found.append(
            Collective(
                kind=TRANSFERS.get(kind[1], "collective-permute"),
                opcode="send and recv",
                arrays=(whole,),
                groups=groups,
                axes=axes_of(groups, mesh_shape),
                executions=executions[computation],
                at_least=computation in endless,
                op_name=line.op_name,
                computation=computation,
            )
        )
    return found


def _whole(line: Instruction, lines: Lines) -> tuple[Array, ...]:
    """What is gathered, or reduced, or sent."""
    if OPCODES[line.opcode] != "all-gather":
        return tuple(array for name in line.operands if name in lines for array in lines[name].arrays)
    # The result of a start is a pair: what goes in, and what comes out.
    return line.arrays[len(line.arrays) // 2 :] if line.opcode.endswith("-start") else line.arrays


def _really(
    program: Program, computation: str, line: Instruction, parts: int
) -> dict[Kind, tuple[Array, ...]]:
    """What an all-reduce does with which of its arrays.

    Arrays that each device has filled its part of, it gathers; those of which only a device's part
    stays, it scatters.
    """
    lines = program.computations[computation]
    found: dict[Kind, tuple[Array, ...]] = {}
    for place, (name, array) in enumerate(zip(line.operands, line.arrays, strict=True)):
        kind: Kind = "all-reduce"
        if _fills_in_part(*_source(program, computation, name), parts):
            kind = "all-gather"
        else:
            results = [line.name] if len(line.arrays) == 1 else _elements(lines, line.name, place)
            users = [user for result in results for user in _users(program, computation, result)]
            if users and all(
                user.opcode == "dynamic-slice" and _is_part(user, inside.get(user.operands[0]), parts)
                for user, inside in users
            ):
                kind = "reduce-scatter"
        found[kind] = (*found.get(kind, ()), array)
    return found


def _elements(lines: Lines, name: str, place: int) -> list[str]:
    """The instructions that take one element of a tuple."""
    index = re.compile(rf", index={place}\b")
    return [
        line.name
        for line in lines.values()
        if line.opcode == "get-tuple-element" and name in line.operands and index.search(line.text)
    ]


def _fills_in_part(source: Instruction | None, lines: Lines, parts: int) -> bool:
    if source is None or source.opcode != "dynamic-update-slice":
        return False
    return _is_part(lines.get(source.operands[1]), source, parts)


def _is_part(part: Instruction | None, whole: Instruction | None, parts: int) -> bool:
    """Whether a result is one of so many even parts of another."""
    if part is None or whole is None or len(part.arrays) != 1 or len(whole.arrays) != 1:
        return False
    elements = whole.arrays[0].elements
    return elements <= part.arrays[0].elements * parts <= _PADDING * elements


def _source(program: Program, computation: str, name: str) -> tuple[Instruction | None, Lines]:
    """Where an operand was computed before it was passed on, be it inside of a fusion; and its lines."""
    lines = program.computations[computation]
    line = lines.get(name)
    while line is not None and line.opcode in PASSED_ON and line.operands:
        line = lines.get(line.operands[0])
    if line is not None and line.opcode == "fusion" and line.called:
        inside = program.computations[line.called[0]]
        roots = [root for root in inside.values() if root.is_root]
        return _source(program, line.called[0], roots[0].name) if roots else (None, inside)
    return line, lines


def _users(program: Program, computation: str, name: str) -> list[tuple[Instruction, Lines]]:
    """Who computes with a result, and not only passes it on, be it inside of a fusion; and their lines."""
    lines = program.computations[computation]
    users: list[tuple[Instruction, Lines]] = []
    for line in lines.values():
        if name not in line.operands:
            continue
        if line.opcode in PASSED_ON:
            users += _users(program, computation, line.name)
        elif line.opcode == "fusion" and line.called:
            inside = program.computations[line.called[0]]
            wanted = {f" parameter({k})" for k, operand in enumerate(line.operands) if operand == name}
            for inner in inside.values():
                if inner.opcode == "parameter" and any(text in inner.text for text in wanted):
                    users += _users(program, line.called[0], inner.name)
        else:
            users.append((line, lines))
    return users


def _in_endless_loops(program: Program) -> set[str]:
    """Computations that are executed, directly or not, by a loop whose trips the text does not tell."""
    waiting = [
        called
        for name, line in program
        if line.opcode == "while" and program.trips(name, line) is None
        for called in line.called
    ]
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += [called for line in program.computations[name].values() for called in line.called]
    return inside
