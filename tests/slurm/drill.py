"""`python -m tests.slurm.drill [--output FILE]`: a run on a real Slurm, disturbed in every way.

Brings a cluster up on this machine, trains the tiny run undisturbed on one node and on two, then once for
each disturbance through the shipped batch script, and writes what came of it as a table. Ends with 1 if any
run did not become the one it would have been.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.slurm.disturbances import DISTURBANCES, Outcome, disturb
from tests.slurm.real_slurm import Settings, Slurm, cluster, difference, missing_for_slurm, same_weights

ROUNDING = 1e-4
"""Between one process and two, relative: sums of float32 in another order, over all steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every run ended as it would have undisturbed."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.drill", description=__doc__)
    parser.add_argument("--output", type=Path, help="where the table is written, beside the terminal")
    parser.add_argument("--folder", type=Path, help="kept afterwards; default a temporary one, removed")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=list(DISTURBANCES), default=list(DISTURBANCES))
    options = parser.parse_args(argv)
    missing = missing_for_slurm()
    if missing is not None:
        print(f"error: no cluster can be brought up here: {missing}", file=sys.stderr)
        return 2
    settings = Settings(steps=options.steps, batch=options.batch, interval=10)
    with (
        tempfile.TemporaryDirectory(prefix="slurm-drill-") as temporary,
        cluster(options.folder or Path(temporary), settings) as slurm,
    ):
        record, is_right = _drill(slurm, options.only)
    print(record)
    if options.output is not None:
        options.output.write_text(record)
    return 0 if is_right else 1


def _drill(slurm: Slurm, names: Sequence[str]) -> tuple[str, bool]:
    """The record, and whether everything is as it should be."""
    settings = slurm.settings
    undisturbed = {}
    for nodes, devices in ((2, 2), (1, 4)):
        job = slurm.train(f"undisturbed_{nodes}", nodes=nodes, devices=devices)
        state = job.finish()
        if state != "COMPLETED":
            raise AssertionError(f"the undisturbed run ended as {state}\n{job.log}\n{job.rank_log(0)}")
        undisturbed[nodes] = job
        slurm.undisturbed_seconds = max(time.time() - job.submitted, slurm.undisturbed_seconds)
        _say(f"undisturbed on {nodes} nodes: {time.time() - job.submitted:.0f} s")
    apart = difference(undisturbed[2].run_dir, undisturbed[1].run_dir, steps=settings.steps)
    outcomes = []
    for name in names:
        nodes = DISTURBANCES[name][2]
        outcomes.append(disturb(slurm, name, undisturbed[nodes]))
        _say(f"{name}: {'as undisturbed' if outcomes[-1].is_right else 'NOT RIGHT'} {outcomes[-1]}")
    same = same_weights(undisturbed[2].run_dir, undisturbed[1].run_dir, steps=settings.steps)
    lines = [
        f"Slurm {slurm.call('sinfo', '--version').split()[-1]}, three nodes on one machine; {settings.steps} "
        f"steps of {settings.batch} rows, a checkpoint every {settings.interval}; 2 nodes of 2 CPU devices "
        "each, or 1 node of 4.",
        "",
        f"Undisturbed, two nodes against one process: losses differ by {apart:.1e} at most (relative)"
        f"{', weights are equal bit for bit' if same else ''}.",
        "",
        "| what happened | the first start | restarts | went on after step | seconds | losses | weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, outcomes),
    ]
    return "\n".join(lines) + "\n", apart < ROUNDING and all(one.is_right for one in outcomes)


def _row(one: Outcome) -> str:
    """One line of the table."""
    notes = f"; {'; '.join(one.notes)}" if one.notes else ""
    cells = (
        one.case,
        one.ended + notes,
        str(one.restarts),
        ", ".join(map(str, one.went_on_after)) or "none",
        f"{one.seconds:.0f}",
        "equal" if one.loss_difference == 0.0 else f"differ by {one.loss_difference:.1e}",
        "equal" if one.weights_equal else "differ",
    )
    return f"| {' | '.join(cells)} |"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
