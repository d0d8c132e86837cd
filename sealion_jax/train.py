"""`python -m sealion_jax.train [RECIPE] [--run-dir DIR] [--some.field VALUE ...]`: trains, or goes on training.

Running the same command again in the same run directory resumes from the newest good checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from etils import epath

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.recipe import TrainConfig, apply_overrides, check_resume, from_json, load_recipe, to_json


def main(argv: Sequence[str]) -> None:
    """Parses, joins the other processes, and trains."""
    options, overrides = _parse(argv)
    config = apply_overrides(load_recipe(options.recipe), overrides)
    run_dir = epath.Path(options.run_dir or config.run_dir or f"runs/{config.name}")

    from sealion_jax import distributed

    distributed.join(
        distributed.DistributedConfig(
            coordinator_address=options.coordinator_address,
            num_processes=options.num_processes,
            process_id=options.process_id,
        )
    )
    import jax

    from sealion_jax.checkpoint.lease import RunLease

    is_first = jax.process_index() == 0
    with RunLease(run_dir) if is_first else contextlib.nullcontext() as lease:
        _claim(config, run_dir, write=is_first)
        train(config, run_dir, lease=lease, profile=options.profile)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the overrides of the recipe's fields that are left."""
    parser = argparse.ArgumentParser(
        prog="python -m sealion_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other --some.field VALUE overrides a field of the recipe; docs/recipes.md lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="a name in configs/, or a Python file; default cpt_tiny")
    parser.add_argument("--run-dir", help="where the run lives, local or gs://; default runs/<recipe>")
    parser.add_argument("--profile", action="store_true", help="trace three steps into <run>/profile")
    parser.add_argument("--coordinator-address", help="host:port of process 0, when there are several")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    return parser.parse_known_args(list(argv))


def _claim(config: TrainConfig, run_dir: epath.Path, *, write: bool) -> None:
    """Writes the recipe into a fresh run directory, or checks that the directory is of this recipe."""
    path = run_dir / "config.json"
    if path.exists():
        check_resume(from_json(path.read_text()), config)
    if write:
        run_dir.mkdir(parents=True, exist_ok=True)
        new = run_dir / "config.json.new"
        new.write_text(to_json(config))
        new.replace(path)


def train(config: TrainConfig, run_dir: epath.Path, *, lease: Any, profile: bool = False) -> None:
    """Builds everything the recipe names, restores what there is, and runs the loop to its end."""
    import jax

    from sealion_jax.checkpoint.orbax import Checkpointer
    from sealion_jax.distributed import StopRequest
    from sealion_jax.training import hooks
    from sealion_jax.training.loop import Run
    from sealion_jax.training.loop import train as run_loop

    started = time.time()
    is_first = jax.process_index() == 0
    say = print if is_first else lambda *_, **__: None
    parts = _build(config, say)
    stop = StopRequest()
    with Checkpointer(
        run_dir, config.checkpoints, assets=parts.assets, lease=lease, report=lambda line: say(line, file=sys.stderr)
    ) as checkpointer:
        run, skips = _begin(config, parts, checkpointer, say)
        ...
