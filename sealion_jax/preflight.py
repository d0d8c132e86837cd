"""`python -m sealion_jax.preflight [--run-dir DIR]`: a minute's check of every node before a long run.

Started as training is, on the same nodes; takes the same options on how processes find each other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sealion_jax import cli
from sealion_jax.checks import check_number
from sealion_jax.distributed import DistributedConfig, join
from sealion_jax.stopping import StopRequest

EXIT_SLOW = 1


@dataclass(frozen=True, kw_only=True)
class PreflightOptions(DistributedConfig):
    """What is measured, and where it is told."""

    run_dir: str | None = None
    """Where the run will live, local or gs://: what storage is measured. None leaves storage out."""
    output: str | None = None
    """Where to write all of it as JSON, on process 0's machine."""
    exclude_file: str | None = None
    """Where to write the names of slow nodes, as `sbatch --exclude` takes them; empty where none is slow."""
    slow_below: float = 0.8
    """A node whose slowest device multiplies at less than this part of the median of all nodes is slow."""
    slow_storage_below: float = 0.5
    """The same of writing and reading, which vary more."""
    seconds: float = 3.0
    """About so long each rate is measured."""
    storage_mebibytes: int = 256
    """Each process writes and reads so much."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slow_below", "slow_storage_below"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name), least=0, below=1)
        check_number("--seconds", self.seconds, above=0, below=600)
        check_number("--storage-mebibytes", self.storage_mebibytes, least=1, whole=True)


def main(argv: Sequence[str]) -> int:
    """Measures together with the other processes, and prints what came of it; the exit code."""
    options = cli.parse(
        PreflightOptions, argv, prog="python -m sealion_jax.preflight", description=main.__doc__
    )
    stop = StopRequest()
    measured_with = {
        name: str(getattr(options, name))
        for name in ("run_dir", "seconds", "storage_mebibytes", "slow_below", "slow_storage_below")
    }
    joined = join(options, os.environ, facts=measured_with, asked_to_stop=lambda: stop.heard)
    from sealion_jax.preflighting import report
    from sealion_jax.preflighting.together import measure

    measured, all_reduce = measure(
        joined.host,
        run_dir=options.run_dir,
        seconds=options.seconds,
        storage_mebibytes=options.storage_mebibytes,
    )
    nodes = report.by_node(measured)
    slow = report.slow_nodes(nodes, below=options.slow_below, storage_below=options.slow_storage_below)
    if joined.process == 0:
        print("\n".join(report.table(nodes, list(slow), all_reduce)), flush=True)
        if options.output is not None:
            plain = report.to_plain(measured, nodes, slow, all_reduce)
            Path(options.output).write_text(json.dumps(plain, indent=2) + "\n")
        if options.exclude_file is not None:
            Path(options.exclude_file).write_text(",".join(slow) + "\n" if slow else "")
        for name, reasons in slow.items():
            print(f"{name} is slow. {'. '.join(reasons)}", file=sys.stderr, flush=True)
    return EXIT_SLOW if slow else cli.EXIT_DONE


def command(argv: Sequence[str]) -> None:
    """`main`, whose exit code is the process's."""
    code = main(argv)
    sys.stdout.flush()
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    cli.run(command)
