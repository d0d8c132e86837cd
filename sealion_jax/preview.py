"""`python -m sealion_jax.preview RECIPE --step N [--row K] [--some.field VALUE ...]`: what a model will see.

Shows the rows of a step as text: every document in them with its source, language, segment and place in its
store, and which tokens are not learned. The first step's batch is step 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sealion_jax import cli
from sealion_jax.errors import UserError

SHORT_TOKENS = 80


def main(argv: Sequence[str]) -> None:
    """Parses, opens the recipe's data, and prints."""
    options, overrides = _parse(argv)
    if options.step < 0:
        raise UserError(f"--step is {options.step}; the first step's batch is 0")

    from sealion_jax.data.batches import GlobalBatches
    from sealion_jax.data.mixture import open_mixture
    from sealion_jax.data.rendering import PLAIN, TERMINAL, render_step
    from sealion_jax.recipe import load_and_override
    from sealion_jax.tokenizer import Tokenizer

    config = load_and_override(options.recipe, overrides, options=("row",))
    if options.row is not None and not 0 <= options.row < config.global_batch_size:
        raise UserError(
            f"--row is {options.row}; a step has rows 0 to {config.global_batch_size - 1} (global_batch_size)"
        )
    tokenizer = Tokenizer.load(config.tokenizer)
    mixture = open_mixture(
        config.data,
        sequence_length_tokens=config.sequence_length_tokens,
        global_batch_size=config.global_batch_size,
        tokenizer=tokenizer,
    )
    batches = GlobalBatches(
        mixture, global_batch_size=config.global_batch_size, skips=_recorded_skips(options.run_dir)
    )
    for line in render_step(
        batches,
        tokenizer,
        options.step,
        rows=None if options.row is None else [options.row],
        marks=TERMINAL if sys.stdout.isatty() else PLAIN,
        most_tokens=SHORT_TOKENS if options.row is None else None,
    ):
        print(line)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the overrides of the recipe's fields that are left."""
    parser = argparse.ArgumentParser(
        prog="python -m sealion_jax.preview",
        usage="%(prog)s [RECIPE] --step N [--row K] [--run-dir DIR] [--some.field VALUE ...]",
        description=(__doc__ or "").split("\n", 1)[1],
        epilog="RECIPE is a name in configs/ or a Python file that defines recipe(); without one, cpt_tiny.",
        allow_abbrev=False,
    )
    parser.add_argument("--step", type=int, required=True, help="of the run; its first is 0")
    parser.add_argument("--row", type=int, help="only this row of the batch, with its whole text")
    parser.add_argument("--run-dir", help="leave out the batches that this run has recorded as skipped")
    # The recipe comes first or not at all: a later word is the value of some override.
    named = bool(argv) and not argv[0].startswith("-")
    options, overrides = parser.parse_known_args(list(argv[1:] if named else argv))
    options.recipe = argv[0] if named else None
    return options, overrides


def _recorded_skips(run_dir: str | None) -> tuple[tuple[int, int], ...]:
    """The skipped ranges that a run's newest checkpoint has; what is damaged is told, and passed over."""
    if run_dir is None:
        return ()
    from sealion_jax.checkpoint.digests import read_checked
    from sealion_jax.checkpoint.layout import TRAIN_FILE, StepDirectories

    directories = StepDirectories(run_dir)
    for step in reversed(directories.complete()):
        train = read_checked(directories[step], TRAIN_FILE)
        if train is not None:
            return tuple((first, count) for first, count in json.loads(train)["skips"])
        print(f"checkpoint {step} is damaged: {directories[step] / TRAIN_FILE}", file=sys.stderr)
    raise UserError(f"{run_dir} has no good checkpoint; leave --run-dir out to preview the recipe")


if __name__ == "__main__":
    cli.run(main)
