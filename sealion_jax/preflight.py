"""`python -m sealion_jax.preflight [--run-dir DIR]`: a minute's check of every node before a long run.

Started as training is, on the same nodes; takes the same options on how processes find each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sealion_jax import cli
from sealion_jax.checks import check_number
from sealion_jax.distributed import DistributedConfig, Joined, join
from sealion_jax.errors import UserError
from sealion_jax.stopping import StopRequest

if TYPE_CHECKING:
    from sealion_jax.preflighting.limit import Limit

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
    least_of_peak: float = 0.4
    """A node whose slowest device reaches less than this part of its maker's figure is slow; 0: none is."""
    limit_seconds: float = 300.0
    """No process may take longer for a measurement; beyond it is named, and all end."""
    heartbeat_timeout_seconds: int = 60
    """A process that was not heard of for half of it is named, and all end; after all of it JAX ends them."""
    seconds: float = 3.0
    """About so long each rate is measured."""
    storage_mebibytes: int = 256
    """Each process writes and reads so much."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slow_below", "slow_storage_below", "least_of_peak"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name), least=0, below=1)
        check_number("--seconds", self.seconds, above=0, below=600)
        # Compiling, a first try and the measured one.
        check_number("--limit-seconds", self.limit_seconds, above=4 * self.seconds)
        check_number("--storage-mebibytes", self.storage_mebibytes, least=1, whole=True)


def main(argv: Sequence[str]) -> int:
    """Measures together with the other processes, and prints what came of it; the exit code."""
    options = cli.parse(
        PreflightOptions, argv, prog="python -m sealion_jax.preflight", description=main.__doc__
    )
    stop = StopRequest()

    def exclude(nodes: Sequence[str]) -> None:
        _exclude(options.exclude_file, nodes)

    facts = _measured_with(options)
    joined = join(options, os.environ, facts=facts, asked_to_stop=lambda: stop.heard, blame=exclude)
    from sealion_jax.checkpoint.processes import on_first_process
    from sealion_jax.preflighting import report
    from sealion_jax.preflighting.together import measure

    with _limit(joined, options, exclude) as limit:
        with limit.doing("the first words", together=True):
            on_first_process(lambda: _check_places(options))
        measured, all_reduce = measure(
            joined.host,
            limit=limit,
            run_dir=options.run_dir,
            seconds=options.seconds,
            storage_mebibytes=options.storage_mebibytes,
        )
    nodes = report.by_node(measured)
    slow = report.slow_nodes(
        nodes,
        below=options.slow_below,
        storage_below=options.slow_storage_below,
        least_of_peak=options.least_of_peak,
    )
    if joined.process == 0:
        print("\n".join(report.table(nodes, list(slow), all_reduce)), flush=True)
        for name, reasons in slow.items():
            print(f"{name} is slow. {'. '.join(reasons)}", file=sys.stderr, flush=True)
        exclude(list(slow))
        if options.output is not None:
            plain = report.to_plain(measured, nodes, slow, all_reduce)
            Path(options.output).write_text(json.dumps(plain, indent=2) + "\n")
    return EXIT_SLOW if slow else cli.EXIT_DONE


def _measured_with(options: PreflightOptions) -> dict[str, str]:
    """What has to be the same for all processes: what is measured and how, not who tells it where."""
    others = {field.name for field in dataclasses.fields(DistributedConfig)} | {"output", "exclude_file"}
    names = (field.name for field in dataclasses.fields(options) if field.name not in others)
    return {f"--{name.replace('_', '-')}": str(getattr(options, name)) for name in names}


def _limit(joined: Joined, options: PreflightOptions, blame: Callable[[Sequence[str]], None]) -> Limit:
    """What ends all processes when one of them does not get on."""
    from sealion_jax.preflighting.limit import JaxStore, Limit

    return Limit(
        [one.host for one in joined.devices] or [joined.host],
        process=joined.process,
        limit_seconds=options.limit_seconds,
        silent_seconds=options.heartbeat_timeout_seconds / 2,
        store=JaxStore() if len(joined.devices) > 1 else None,
        blame=blame,
    )


def _check_places(options: PreflightOptions) -> None:
    """Raises UserError if what is found could not be written in the end."""
    for option, place in (("--output", options.output), ("--exclude-file", options.exclude_file)):
        if place is None:
            continue
        was_there = Path(place).exists()
        try:
            with Path(place).open("a"):
                pass
            if not was_there:
                Path(place).unlink()
        except OSError as error:
            raise UserError(f"{option} {place} cannot be written: {error.strerror or error}") from error
    _exclude(options.exclude_file, [])


def _exclude(place: str | None, nodes: Sequence[str]) -> None:
    """Writes the nodes as `sbatch --exclude` takes them; where that fails they are told nonetheless."""
    if place is None:
        return
    try:
        Path(place).write_text(",".join(nodes) + "\n" if nodes else "")
    except OSError as error:
        print(f"{place} was not written ({error}): {','.join(nodes)}", file=sys.stderr, flush=True)


def command(argv: Sequence[str]) -> None:
    """`main`, whose exit code is the process's."""
    code = main(argv)
    sys.stdout.flush()
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    cli.run(command)
