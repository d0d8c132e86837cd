"""`python -m sealion_jax.plan [RECIPE] --topology v5p:4x4x4 [--some.field VALUE ...]`: what it will take.

Compiles the real training step for a TPU pod that is not there, and tells memory, traffic and speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.planning.environment import prepare_environment

if TYPE_CHECKING:
    from etils import epath

OPTIONS = ("topology", "num-slices", "output", "search", "candidates", "processes")
"""This command's own, beside the recipe's fields."""


def main(argv: Sequence[str]) -> None:
    """Parses, plans (or searches), shows the report and writes it; UserError if nothing fits."""
    options, overrides = _parse(argv)
    # Before JAX is imported: it and TPU's compiler read this as they start.
    prepare_environment()

    import jax

    jax.config.update("jax_platforms", "cpu")

    from sealion_jax.compiler import set_flags
    from sealion_jax.planning.candidates import CANDIDATES
    from sealion_jax.planning.planner import model_of, plan
    from sealion_jax.planning.search import search
    from sealion_jax.planning.tables import render, render_search
    from sealion_jax.planning.topology import parse_topology
    from sealion_jax.recipe import load_and_override
    from sealion_jax.run.update import check_compute

    topology = parse_topology(options.topology, num_slices=options.num_slices)
    config = load_and_override(options.recipe, overrides, options=OPTIONS)
    set_flags(config.compiler, os.environ)  # as `train` does; TPU's compiler is not loaded yet
    model = model_of(config)
    output = _output(options.output)
    if not options.search:
        report = plan(config, model, topology, tell=_tell)
        print(render(report))
        _write(output, report)
    else:
        # Not by each of the processes that compile the candidates.
        check_compute(config.compute, platform=topology.platform, chip=topology.chip)
        words = [] if options.recipe is None else [options.recipe]
        words += ["--topology", options.topology, "--num-slices", str(options.num_slices), *overrides]
        found = search(
            config,
            model,
            topology,
            command=words,
            most=options.candidates or CANDIDATES,
            processes=options.processes,
            tell=_tell,
        )
        report = found.reports[0]
        print(render(report), render_search(found.reports, found.failed), sep="\n\n")
        _write(output, {"best": report, "search": found.reports, "failed": found.failed})
    if not report["fits"]:
        exceeded = report["memory"]["exceeded_by"] / 2**30
        what = "none of the candidates fits" if options.search else f"{config.name} does not fit"
        raise UserError(
            f"{what} on {options.topology}, by {exceeded:.2f} GiB a chip; "
            "the report says what would free that"
        )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the overrides of the recipe's fields that are left."""
    parser = argparse.ArgumentParser(
        prog="python -m sealion_jax.plan",
        usage="%(prog)s [RECIPE] --topology CHIP:SHAPE [options] [--some.field VALUE ...]",
        description=(__doc__ or "").split("\n", 1)[1],
        epilog="RECIPE is a name in configs/ or a Python file that defines recipe(); without one, cpt_tiny.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology",
        help="v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, v4:4x4x4; GPUs as nodes x GPUs: h100:8x8",
    )
    parser.add_argument("--num-slices", type=int, default=1, help="TPU slices, joined by the slow network")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--search", action="store_true", help="try meshes, microbatches and remat policies")
    parser.add_argument("--candidates", type=int, help="of a search: how many to compile (8)")
    parser.add_argument(
        "--processes", type=int, help="of a search: that compile at once; default: as cores and memory allow"
    )
    # The recipe comes first or not at all: a later word is the value of some override.
    named = bool(argv) and not argv[0].startswith("-")
    options, overrides = parser.parse_known_args(list(argv[1:] if named else argv))
    options.recipe = argv[0] if named else None
    if options.topology is None:
        raise UserError("--topology is missing: the pod to plan for, such as v5p:4x4x4 or h100:8x8")
    for name in ("candidates", "processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
        if value is not None and not options.search:
            raise UserError(f"--{name} is of a search; give --search, or leave it out")
    return options, overrides


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _output(name: str | None) -> epath.Path | None:
    """The file to write, its folder made: found now if that cannot be, not after the work."""
    if name is None:
        return None
    from etils import epath

    output = epath.Path(name)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a directory, not the name of a JSON file")
    except Exception as error:  # a bucket's client raises errors of its own
        raise UserError(f"cannot write --output {name}: {error}; choose another place") from error
    return output


def _write(output: epath.Path | None, report: dict[str, Any]) -> None:
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
        _tell(f"written to {output}")


if __name__ == "__main__":
    cli.run(main)
