"""Every implementation of attention against the dense path over the full product of masks, shapes and dtypes.

    python benchmarks/attention_exactness.py --output docs/figures     2,160 cases of each: hours on 2 cores
    python benchmarks/attention_exactness.py --every 20 --implementations gpu

Forward and backward; kernels of devices that are not here are interpreted. Prints, and writes as JSON, the
largest relative error of each output, by implementation and dtype; goes on where it stopped. Fails if one is
above its bound (tests/kernels/attention_cases.py has the cases, the measure and the bounds).
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from attention_cases import BOUNDS, Case, errors, product, true_answer  # noqa: E402
from test_attention_kernels import GPU, TPU  # noqa: E402

from sealion_jax import cli  # noqa: E402

IMPLEMENTATIONS = ("blockwise", "gpu", "tpu")
KERNELS = {"gpu": GPU, "tpu": TPU}
OUTPUTS = ("out", "log_sum", "d_query", "d_key", "d_value")


def main() -> None:
    """Runs what has not been run, and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--every", type=int, default=1, help="only every so manieth case")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for the JSON; none without it")
    options = parser.parse_args()
    kept = None if options.output is None else options.output / "attention_exactness.json"
    found: dict[str, dict[str, float]] = {}
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text())["cases"]
    cases = product()[:: options.every]
    asked = {f"{name}: {case}": case for name in options.implementations for case in cases}
    missing = [
        (case, names)
        for case in cases
        if (names := [name for name in options.implementations if f"{name}: {case}" not in found])
    ]
    with (
        ProcessPoolExecutor(options.processes) as pool,
        cli.Progress(len(missing), "attention", unit="case") as shown,
    ):
        for number, some in enumerate(pool.map(measure, missing)):
            found |= some
            shown.update()
            if kept is not None and (number % 20 == 19 or number + 1 == len(missing)):
                kept.write_text(json.dumps({"cases": found}, indent=0) + "\n")
    report(asked, found)


def measure(question: tuple[Case, list[str]]) -> dict[str, dict[str, float]]:
    """Of a case, by implementation and case: the relative error of each output."""
    case, names = question
    truth = true_answer(case)
    # Asked for here: what depends on the device must not start JAX before the processes are forked.
    blocks = {name: kernel.blocks for name, kernel in KERNELS.items()}
    return {f"{name}: {case}": errors(name, case, truth=truth, blocks=blocks.get(name)) for name in names}


def report(asked: dict[str, Case], found: dict[str, dict[str, float]]) -> None:
    """Prints the largest errors, and fails if one is above its bound."""
    print("| implementation | dtype | cases | " + " | ".join(OUTPUTS) + " |")
    print("| --- | --- " + "| ---: " * (1 + len(OUTPUTS)) + "|")
    too_large = []
    for name in IMPLEMENTATIONS:
        for dtype, bound in BOUNDS.items():
            some = [found[key] for key, case in asked.items() if key.startswith(name) and case.dtype == dtype]
            if not some:
                continue
            worst = {output: max(one[output] for one in some) for output in OUTPUTS}
            print(
                f"| {name} | {dtype} | {len(some)} | " + " | ".join(f"{x:.1e}" for x in worst.values()) + " |"
            )
            too_large += [f"{name}, {dtype}: {o} {x:.1e}" for o, x in worst.items() if not x < bound]
    assert not too_large, too_large


if __name__ == "__main__":
    main()
