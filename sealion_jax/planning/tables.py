"""A plan's JSON as tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The whole plan."""
    parts = [_head(report), _assumed(report), _step(report), _parameters(report), _memory(report)]
    if report["collectives"] is not None:
        parts.append(_collectives(report))
    if report["speed"] is not None:
        parts.append(_speed(report))
    if report["advice"]:
        parts.append(
            "What would make it fit (estimates)\n" + "\n".join(f"  {line}" for line in report["advice"])
        )
    parts.append("Not known here\n" + "\n".join(f"  {line}" for line in report["not_known"]))
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows as lines, columns aligned: the first ones to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def figure(value: float, decimals: int, *, digits: int = 2) -> str:
    """A number with so many decimals, or with more where fewer significant digits were left of it."""
    if value:
        decimals = max(decimals, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def count_of_tokens(tokens: float) -> str:
    """In billions, or in millions or thousands where there are fewer."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:,.1f}{unit}"
    return f"{tokens:,.0f}"


def _head(report: Report) -> str:
    lines = [f"Plan of {report['recipe']} on {report['topology']}"]
    if report["method"] == "analytical":
        lines.append("ANALYTICAL: by formulas, nothing was compiled; memory may be off by half")
    else:
        versions = report["versions"]
        how = f"libtpu {versions['libtpu']}, JAX {versions['jax']}"
        lines.append(f"The training step itself, compiled in {report['compile_seconds']:.0f} s ({how})")
    return "\n".join(lines)


def _assumed(report: Report) -> str:
    given = report["assumptions"]
    is_tpu = "links" in given
    fraction = "" if is_tpu else f" ({given['memory_variable']} {given['memory_fraction']})"
    rows = [
        ("bf16 matmuls", f"{given['bf16_tflops']:,.0f} TFLOP/s"),
        (f"memory that programs may use{fraction}", f"{given['hbm_gib']:.2f} GiB"),
        ("its bandwidth", f"{given['hbm_gb_per_s']:,.0f} GB/s"),
    ]
    if report["quantization"] == "int8":
        rows.insert(1, ("int8 matmuls", f"{given['int8_tops']:,.0f} TOP/s"))
    if report["quantization"] == "fp8":
        rows.insert(1, ("fp8 matmuls", f"{given['fp8_tflops']:,.0f} TFLOP/s"))
    if is_tpu:
        rows.append(("all its links, one way", f"{given['links_gb_per_s']:,.0f} GB/s"))
        rows += [
            (
                f"received along direction {name[-1]}: {'ring' if one['ring'] else 'line'} of {one['chips']}",
                f"{one['gb_per_s']:,.0f} GB/s",
            )
            for name, one in given["links"].items()
        ]
        other = given["network_taken_from"]
        whose = f" (as {other}'s: none is published)" if other else ""
        rows.append((f"network between slices, one way{whose}", f"{given['network_gb_per_s']:,.2f} GB/s"))
        if given["devices_a_chip"] > 1:
            rows.append(("devices, each an even part of this", str(given["devices_a_chip"])))
    else:
        rows.append(("NVLink in the node, one way", f"{given['link_gb_per_s']:,.0f} GB/s"))
        rows.append(("network between nodes, one way", f"{given['network_gb_per_s']:,.0f} GB/s"))
    lines = f"Assumed of each {given['chip']} chip (sources: sealion_jax/hardware.py)\n" + table(rows)
    if "pair_places_a_row" in given:
        lines += (
            f"\n  Rows have room for {given['pair_places_a_row']} pairs: one for every "
            f"{given['tokens_a_pair_place']} tokens; the data decides."
        )
    return lines


def _step(report: Report) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    kept = [f"{name} {', '.join(report[name])}" for name in ("keep", "offload") if report[name]]
    quantized = [] if report["quantization"] == "none" else [f"quantization {report['quantization']}"]
    remat = "; ".join([f"remat {report['remat']}", *kept, *quantized])
    rows = f"{report['global_batch_size']:,} rows of {report['sequence_length_tokens']:,} tokens"
    flags = ", ".join(report["compiler_flag_sets"]) or "none"
    parts = report["microbatches"]
    return (
        f"The step: {rows} in {parts} microbatch{'es' if parts > 1 else ''}; mesh {mesh}; {remat}; "
        f"compiler flag sets {flags}"
    )


def _parameters(report: Report) -> str:
    """How weights are split; those whose name ends with scale, which are copied, only in JSON."""
    rows = [(name, split) for name, split in report["parameters"].items() if not name.endswith("scale")]
    return "Parameters, and the axes that they are split over (as the optimizer's state is)\n" + table(
        rows, left=2
    )


def _memory(report: Report) -> str:
    memory = report["memory"]
    other = report.get("analytical", {}).get("memory")
    # A small model's kinds would all be 0.00 GiB.
    unit, size_of_unit = ("GiB", GIB) if memory["needed"] >= GIB else ("MiB", MIB)

    def told(size: float) -> str:
        return f"{size / size_of_unit:,.2f}"

    header = [f"Memory of a chip, {unit}", report["method"], *(["analytical"] if other else [])]
    rows = [header]
    for kind, size in memory["kinds"].items():
        beside = [told(other["kinds"][kind]) if kind in other["kinds"] else ""] if other else []
        rows.append([kind, told(size), *beside])
    for label, key in (("in all", "needed"), ("of", "available")):
        rows.append([label, told(memory[key]), *([told(other[key])] if other else [])])
    text = table(rows)
    if report["fits"]:
        free = memory["available"] - memory["needed"]
        return text + f"\n  It fits: {told(free)} {unit} are free."
    least = "at least " if memory["at_least"] else ""
    text += f"\n  IT DOES NOT FIT, by {least}{told(memory['exceeded_by'])} {unit}."
    return text + "".join(f"\n  among the largest: {one}" for one in memory["largest_allocations"])


def _collectives(report: Report) -> str:
    rows = [
        ["Collectives of a step", "over", "devices", "times", "GB received", "s on links", "s on network"]
    ]
    for one in report["collectives"]:
        others = [word for word in one["written_as"] if word != one["kind"]]
        written = f" (written as {', '.join(others)})" if others else ""
        rows.append(
            [
                one["kind"] + written,
                " x ".join(one["axes"]),
                str(one["group_size"]),
                ("at least " if one["at_least"] else "") + f"{one['executions']:,}",
                figure(one["received_bytes"] / 1e9, 3, digits=1),
                figure(one["seconds_on_links"], 3, digits=1),
                figure(one["seconds_on_network"], 3, digits=1),
            ]
        )
    return table(rows, left=2) if len(rows) > 1 else "Collectives of a step: none"


def _speed(report: Report) -> str:
    speed = report["speed"]
    other = (report.get("analytical") or {}).get("speed")
    rows = [["Seconds of a step at peak rates", report["method"], *(["analytical"] if other else [])]]
    for name in ("matmul", "memory", "network"):
        key = f"{name}_seconds"
        rows.append([name, figure(speed[key], 2), *([figure(other[key], 2)] if other else [])])
    once, again = speed["flops_per_token"] / 1e9, speed["recomputed_flops_per_token"] / 1e9
    flops = (
        f"FLOPs a token: {figure(once, 2)} G, and {figure(again, 2)} G computed again; MFU counts the former"
    )
    if eight := speed["quantized_flops_per_token"]:
        flops += f", at bf16's peak; {figure(eight / 1e9, 2)} G of both are in {report['quantization']}"
    ends = [["", "at best", "nothing overlapped"]]
    shown = {
        "step, seconds": ("step_seconds", 2),
        "MFU": ("mfu", None),
        "tokens/s": ("tokens_per_second", 0),
        "days": ("days", 1),
        "chip-hours": ("chip_hours", 0),
    }
    for label, (key, decimals) in shown.items():
        both = (speed[end][key] for end in ("overlapped", "in_turn"))
        told = (f"{value:.1%}" if decimals is None else figure(value, decimals) for value in both)
        ends.append([label, *told])
    return "\n".join(
        [
            flops,
            "",
            table(rows),
            "",
            f"Bound by {speed['bound_by']}; for {count_of_tokens(speed['tokens'])} tokens:",
            table(ends),
        ]
    )


def render_search(rows: Sequence[Report], failed: Sequence[Report] = ()) -> str:
    """What a search found, best first, and what failed with its last words."""
    lines = [
        ["", "data", "fsdp", "context", "tensor", "microbatches", "remat", "GiB", "MFU", "in turn", "days"]
    ]
    for place, row in enumerate(rows, start=1):
        speed, mesh = row["speed"], row["mesh"]
        lines.append(
            [
                str(place) if row["fits"] else "does not fit",
                *(str(mesh.get(axis, 1)) for axis in ("data", "fsdp", "context", "tensor")),
                str(row["microbatches"]),
                row["remat"],
                figure(row["memory"]["needed"] / GIB, 1),
                "" if speed is None else f"{speed['overlapped']['mfu']:.1%}",
                "" if speed is None else f"{speed['in_turn']['mfu']:.1%}",
                "" if speed is None else figure(speed["overlapped"]["days"], 1),
            ]
        )
    text = table(lines)
    for one in failed:
        mesh = ", ".join(f"{axis} {size}" for axis, size in one["mesh"].items())
        settings = f"{mesh}, microbatches {one['microbatches']}, remat {one['remat']}"
        text += f"\n  failed: {settings}: {one['error'].splitlines()[-1]}"
    return text
