"""A chaos run: killed thirty times and more at random moments; ends with the weights of the undisturbed run.

    python -m tests.chaos.drill                        on a local disk
    python -m tests.chaos.drill --bucket               in a bucket, on a server of GCS's protocol
    python -m tests.chaos.drill --bucket --faults      which refuses, delays or loses one request in ten
    python -m tests.chaos.drill --output docs/figures  adds its record to chaos.json there

Two processes of two CPU devices each. Kills fall while the run starts, compiles, restores, saves or steps, or
at any moment; on one process, on the first, or on all. After each the others must end within a minute and a
half, and the same command is started again. Prints a line for each kill; fails if weights or losses differ
by a bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sealion_jax.cli import Progress
from sealion_jax.goodput import account, goodput, read_sessions
from tests.chaos.kills import Run, different_arrays, random_kills
from tests.commands import command_environment
from tests.storage.gcs import Faults, gcs_server
from tests.tiny_run import make_world

SILENT_SECONDS, FAULTY_SILENT_SECONDS = 5, 20
"""A heartbeat that is refused twice, or has no answer, is seconds late."""
OPTIONS = (
    *("--evaluation.sets", "none", "--checkpoints.interval-steps", 3),
    *("--watch.beat-seconds", 0.5),
    *("--join-timeout-seconds", 45),
)


def main() -> None:
    """Parses, runs undisturbed and disturbed, compares, and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=36)
    parser.add_argument("--steps", type=int, default=120, help="some forty kills are done by the 60th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("--faults", action="store_true", help="refuse and delay; with --bucket")
    parser.add_argument("--output", type=Path, help="a folder for chaos.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        world = make_world(Path(folder))
        environment, root = command_environment(devices=2, cache=Path(folder) / "compiled"), f"{folder}/runs"
        if options.bucket:
            server = ending.enter_context(gcs_server())
            door, root = server, server.url("runs")
            if options.faults:
                faults = Faults(refuse=0.04, reset=0.01, lose_answer=0.01, delay=0.05, seed=options.seed)
                door = ending.enter_context(server.faulty(faults))
            environment |= door.environment()
            os.environ.update(server.environment())
        silent = FAULTY_SILENT_SECONDS if options.faults else SILENT_SECONDS
        words = (*OPTIONS, "--steps", options.steps, "--watch.silent-seconds", silent)
        undisturbed = Run(world.recipe, f"{root}/undisturbed", words, environment)
        undisturbed.finish()
        # Compiled steps that are not there yet are part of what is disturbed.
        environment.pop("JAX_COMPILATION_CACHE_DIR")
        row = disturbed(Run(world.recipe, f"{root}/disturbed", words, environment), undisturbed, options)
    report(row, options.output)


def disturbed(run: Run, undisturbed: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The record of the run that is killed; fails where it is not the undisturbed one's in the end."""
    chance = random.Random(options.seed)
    kills, done, slowest = random_kills(options.kills, seed=options.seed), 0, 0.0
    began = time.monotonic()
    with Progress(len(kills), "killed", unit="time") as shown:
        for kill in kills:
            seconds = run.disturb(kill, chance)
            if seconds is None:
                break
            done, slowest = done + 1, max(slowest, seconds)
            shown.say(f"{done}: {kill.victims} killed, {kill.point}; all ended after {seconds:.1f} s")
            shown.update()
    run.finish()
    different = different_arrays(run.run_dir, undisturbed.run_dir, options.steps)
    same_losses = run.losses() == undisturbed.losses()
    where = "bucket, faults" if options.faults else "bucket" if options.bucket else "disk"
    row = {
        "storage": where,
        "kills": done,
        "slowest end, s": round(slowest, 1),
        "steps": options.steps,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "goodput": round(goodput(account(read_sessions(run.run_dir))), 3),
        "different arrays": different,
        "same losses": same_losses,
    }
    print(json.dumps(row))
    assert done >= min(30, options.kills), f"the run came to its end after {done} kills"
    assert not different and same_losses
    return row


def report(row: dict[str, Any], output: Path | None) -> None:
    """Adds the record to those of other storages."""
    if output is None:
        return
    path = output / "chaos.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [*(other for other in rows if other["storage"] != row["storage"]), row]
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
