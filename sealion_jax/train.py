"""`python -m sealion_jax.train [RECIPE] [--run-dir DIR] [--some.field VALUE ...]`: trains, or goes on.

Running the same command again in the same run directory resumes from the newest good checkpoint.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sealion_jax import cli
from sealion_jax.stopping import StopRequest

if TYPE_CHECKING:
    from sealion_jax.checkpoint.lease_files import JobStart
    from sealion_jax.distributed import Cluster

OPTIONS = (
    "profile",
    "coordinator-address",
    "num-processes",
    "process-id",
    "cluster",
    "join-timeout-seconds",
    "heartbeat-timeout-seconds",
    "expect-local-devices",
)
"""This command's own, beside the recipe's fields."""


def main(argv: Sequence[str]) -> None:
    """Parses, joins the other processes, claims the run directory, and trains."""
    began_at = time.time()
    options, overrides = _parse(argv)
    # Before anything that takes long: the run may be asked to stop while it starts.
    stop = StopRequest()

    from etils import epath

    from sealion_jax.compiler import set_flags, set_gpu_memory
    from sealion_jax.hardware import GPU_MEMORY_FRACTION
    from sealion_jax.recipe import load_and_override, to_json

    config = load_and_override(options.recipe, overrides, options=OPTIONS)
    set_flags(config.compiler, os.environ)
    set_gpu_memory(GPU_MEMORY_FRACTION, os.environ)
    run_dir = epath.Path(options.run_dir or config.run_dir or f"runs/{config.name}")

    from sealion_jax import distributed
    from sealion_jax.run import runner

    joined = distributed.join(
        distributed.DistributedConfig(
            coordinator_address=options.coordinator_address,
            num_processes=options.num_processes,
            process_id=options.process_id,
            cluster=options.cluster,
            join_timeout_seconds=options.join_timeout_seconds,
            # After the watch: JAX ends the others without a word, and leaves the silent one alone.
            heartbeat_timeout_seconds=options.heartbeat_timeout_seconds or config.watch.last_resort_seconds,
            expect_local_devices=options.expect_local_devices,
        ),
        os.environ,
        facts={"recipe": to_json(config), "run directory": str(run_dir)},
        asked_to_stop=lambda: stop.heard,
    )
    recipe = [] if options.recipe is None else [options.recipe]
    runner.train(
        config,
        run_dir,
        profile=options.profile,
        stop=stop,
        command=[*recipe, *overrides],
        began_at=began_at,
        start=_job_start(joined.cluster),
    )


def _job_start(cluster: Cluster | None) -> JobStart | None:
    """Which start of a scheduler's job this is, where one tells."""
    if cluster is None or cluster.job_id is None:
        return None
    from sealion_jax.checkpoint.lease_files import JobStart

    return JobStart(job=f"{cluster.kind} {cluster.job_id}", restarts=cluster.restarts)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the overrides of the recipe's fields that are left."""
    parser = argparse.ArgumentParser(
        prog="python -m sealion_jax.train",
        usage="%(prog)s [RECIPE] [options] [--some.field VALUE ...]",
        description=(__doc__ or "").split("\n", 1)[1],
        epilog="RECIPE is a name in configs/ or a Python file that defines recipe(); without one, cpt_tiny.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="this text, and the recipe's fields")
    parser.add_argument(
        "--run-dir", help="where the run lives, a folder or gs://bucket/folder; default runs/<recipe>"
    )
    parser.add_argument("--profile", action="store_true", help="trace three steps into <run>/profile")
    parser.add_argument("--coordinator-address", help="host:port of process 0, where there are several")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument(
        "--cluster",
        default="auto",
        help="who started the processes: slurm, gke, tpu-vm, open-mpi, none; auto (the default) finds out",
    )
    parser.add_argument(
        "--join-timeout-seconds", type=int, default=300, help="how long to wait for missing processes"
    )
    parser.add_argument(
        "--heartbeat-timeout-seconds",
        type=int,
        help="when JAX ends the others of a silent process, if the watch has not; default 60, or more where "
        "watch.silent_seconds is long",
    )
    parser.add_argument(
        "--expect-local-devices", type=int, help="refuse to begin where a process sees fewer devices"
    )
    # The recipe comes first or not at all: a later word is the value of some override.
    named = bool(argv) and not argv[0].startswith("-")
    options, overrides = parser.parse_known_args(list(argv[1:] if named else argv))
    options.recipe = argv[0] if named else None
    if options.help:
        from sealion_jax.recipe import load_recipe, overrides_help

        print(parser.format_help())
        print(overrides_help(load_recipe(options.recipe)))
        raise SystemExit(0)
    return options, overrides


if __name__ == "__main__":
    cli.run(main)
