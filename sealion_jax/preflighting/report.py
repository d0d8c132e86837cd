"""What was measured, by node: which are slower than most, a table, and JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MEMORY_BELOW = 0.9
"""A node with less than this part of the median's memory is told: recipes are fitted to what all have."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process measured."""

    process: int
    host: str
    device_kind: str
    devices: int
    memory_gib: float | None
    tflops: float
    slowest_device: int
    dtype: str
    peak_tflops: float | None
    write_mb_per_s: float | None = None
    read_mb_per_s: float | None = None
    small_write_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node by the slowest of its processes."""

    name: str
    device_kind: str
    devices: int
    memory_gib: float | None
    tflops: float
    slowest_device: str
    """ "process 3's device 2"."""
    dtype: str
    peak_share: float | None
    """Of what the chip's maker publishes; None where that is not known."""
    write_mb_per_s: float | None
    read_mb_per_s: float | None
    small_write_ms: float | None


def by_node(measured: Sequence[Measured]) -> list[Node]:
    """The nodes, in the order of their first processes."""
    nodes = []
    for name in dict.fromkeys(one.host for one in measured):
        own = [one for one in measured if one.host == name]
        slow = min(own, key=lambda one: one.tflops)
        nodes.append(
            Node(
                name=name,
                device_kind=slow.device_kind,
                devices=sum(one.devices for one in own),
                memory_gib=_least([one.memory_gib for one in own]),
                tflops=slow.tflops,
                slowest_device=f"process {slow.process}'s device {slow.slowest_device}",
                dtype=slow.dtype,
                peak_share=None if slow.peak_tflops is None else slow.tflops / slow.peak_tflops,
                write_mb_per_s=_least([one.write_mb_per_s for one in own]),
                read_mb_per_s=_least([one.read_mb_per_s for one in own]),
                small_write_ms=_most([one.small_write_ms for one in own]),
            )
        )
    return nodes


def slow_nodes(
    nodes: Sequence[Node], *, below: float, storage_below: float, least_of_peak: float
) -> dict[str, list[str]]:
    """Node -> what it is slow in and how much, for those below so much of the median of all nodes.

    With an even number of nodes the median is the faster one of the two in the middle, so that of two nodes
    the slower one can be found. What all nodes have in common is found by the chip's own figure: products
    that reach less than `least_of_peak` of it.
    """
    found: dict[str, list[str]] = {}
    for field, what, unit, share in (
        ("tflops", "matrix products", "TFLOP/s", below),
        ("write_mb_per_s", "writing", "MB/s", storage_below),
        ("read_mb_per_s", "reading", "MB/s", storage_below),
        ("memory_gib", "memory", "GiB", MEMORY_BELOW),
    ):
        values = [getattr(node, field) for node in nodes if getattr(node, field) is not None]
        if not values:
            continue
        usual = statistics.median_high(values)
        for node in nodes:
            value = getattr(node, field)
            if value is not None and value < share * usual:
                where = f", {node.slowest_device}" if field == "tflops" else ""
                found.setdefault(node.name, []).append(
                    f"{what}: {value:.3g} {unit}{where}; the median of all nodes is {usual:.3g}"
                )
    for node in nodes:
        if node.peak_share is not None and node.peak_share < least_of_peak:
            found.setdefault(node.name, []).append(
                f"matrix products: {node.peak_share:.0%} of the chip's peak, {node.slowest_device}; at least "
                f"{least_of_peak:.0%} is expected"
            )
    return found


def table(nodes: Sequence[Node], slow: Sequence[str], all_reduce_gb_per_s: float | None) -> list[str]:
    """The lines of a table, a node a row, and of the all-reduce."""
    head = ("node", "devices", "memory", "products", "of peak", "write", "read", "1 KiB write", "")
    rows: list[tuple[str, ...]] = [head]
    for node in nodes:
        rows.append(
            (
                node.name,
                f"{node.devices} x {node.device_kind}",
                _shown(node.memory_gib, "{:.1f} GiB"),
                f"{node.tflops:.3g} TFLOP/s {node.dtype}",
                _shown(node.peak_share, "{:.0%}"),
                _shown(node.write_mb_per_s, "{:.0f} MB/s"),
                _shown(node.read_mb_per_s, "{:.0f} MB/s"),
                _shown(node.small_write_ms, "{:.1f} ms"),
                "slow" if node.name in slow else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = [line.rstrip() for line in lines]
    if all_reduce_gb_per_s is not None:
        lines.append(f"all-reduce over all devices: {all_reduce_gb_per_s:.3g} GB/s (bus bandwidth)")
    return lines


def to_plain(
    measured: Sequence[Measured],
    nodes: Sequence[Node],
    slow: dict[str, list[str]],
    all_reduce_gb_per_s: float | None,
) -> dict[str, Any]:
    """All of it in JSON's own types."""
    return {
        "nodes": [dataclasses.asdict(node) | {"slow": slow.get(node.name, [])} for node in nodes],
        "processes": [dataclasses.asdict(one) for one in measured],
        "all_reduce_gb_per_s": all_reduce_gb_per_s,
        "slow": list(slow),
    }


def _least(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def _most(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
