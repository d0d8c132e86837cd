"""What a chip receives in a step of the 27B, from 64 to 1024 v5p chips: compiled for each, and plotted.

    pip install -e '.[tpu]'                              in an environment of its own
    python benchmarks/weak_scaling.py --output docs/figures

Weak scaling: four rows of 8,192 tokens a chip in one microbatch, so the work of a chip stays the same and the
batch grows with the pod. Weights are split over all chips (`fsdp`) up to 256, and on larger pods over two of
the torus's directions, with copies of them along the third (`data`), which add up their gradients. Each pod's
`plan` runs in a process of its own, one after another (two to five minutes each on 2 cores); what is in the
output's JSON already is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PODS = {
    64: ("v5p:4x4x4", 1, 64),
    128: ("v5p:4x4x8", 1, 128),
    256: ("v5p:4x8x8", 1, 256),
    512: ("v5p:8x8x8", 8, 64),
    1024: ("v5p:8x8x16", 8, 128),
}
"""By chips: topology, data, fsdp."""
ROWS_PER_CHIP = 4
AXES = ("fsdp", "data")


def main() -> None:
    """Plans what is missing, prints the table, and draws the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON and the plot")
    parser.add_argument("--chips", type=int, nargs="+", default=list(PODS), choices=list(PODS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    place = options.output / "weak_scaling.json"
    rows: dict[str, dict[str, Any]] = json.loads(place.read_text()) if place.exists() else {}
    for chips in options.chips:
        if str(chips) not in rows:
            rows[str(chips)] = row_of(chips, plan(chips))
            rows = dict(sorted(rows.items(), key=lambda item: int(item[0])))
            place.write_text(json.dumps(rows, indent=1) + "\n")
    names = list(next(iter(rows.values())))
    print(f"| chips | {' | '.join(names)} |\n| ---: {'| ---: ' * len(names)}|")
    for chips, row in rows.items():
        print(f"| {chips} | {' | '.join(f'{value:.3g}' for value in row.values())} |")
    draw(rows, options.output / "weak_scaling.png")


def plan(chips: int) -> dict[str, Any]:
    """The report of `plan` on the pod with so many chips."""
    topology, data, fsdp = PODS[chips]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        words = ["-m", "sealion_jax.plan", "cpt_27b", "--topology", topology, "--output", str(output)]
        words += ["--mesh.data", str(data), "--mesh.fsdp", str(fsdp)]
        words += ["--global-batch-size", str(ROWS_PER_CHIP * chips)]
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def row_of(chips: int, report: dict[str, Any]) -> dict[str, Any]:
    """What is told of a pod: gigabytes that a chip receives in a step, by axis, and its bounds."""
    received = dict.fromkeys(AXES, 0.0)
    for one in report["collectives"]:
        (axis,) = one["axes"] if len(one["axes"]) == 1 else ("data",)
        received[axis] += one["received_bytes"] / 1e9
    return {
        **{f"over {axis}, GB": size for axis, size in received.items()},
        "memory, GiB": report["memory"]["needed"] / 2**30,
        "network, s": sum(one["seconds_on_links"] for one in report["collectives"]),
        "compile, s": report["compile_seconds"],
    }


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the bytes of a chip over the number of chips, by axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    below = [0.0] * len(rows)
    meaning = {"fsdp": "weights gathered, gradients scattered", "data": "gradients of the copies added up"}
    for axis in AXES:
        sizes = [row[f"over {axis}, GB"] for row in rows.values()]
        axes.bar(list(rows), sizes, bottom=below, label=f"{axis}: {meaning[axis]}", width=0.6)
        below = [one + other for one, other in zip(below, sizes, strict=True)]
    axes.set_xlabel("v5p chips")
    axes.set_ylabel("GB a chip receives in a step")
    axes.set_title("Gemma 3 27B, 4 rows of 8,192 tokens a chip, as compiled")
    axes.set_ylim(0, max(below) * 1.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
