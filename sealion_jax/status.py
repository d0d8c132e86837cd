"""`python -m sealion_jax.status RUN_DIR`: what each process of a run is doing, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.goodput import account, read_sessions, table
from sealion_jax.watching.status import status_lines


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Which run."""

    run_dir: Annotated[str, tyro.conf.Positional]
    """A run directory, local or gs://."""


def main(argv: Sequence[str]) -> None:
    """Prints the table, from the heartbeats in the run directory."""
    options = cli.parse(StatusOptions, argv, prog="python -m sealion_jax.status", description=main.__doc__)
    lines = status_lines(options.run_dir)
    if not lines:
        raise UserError(
            f"{options.run_dir} has no heartbeats: no run began there, or it is not a run directory; give "
            "the one that train was given, or runs/<recipe>"
        )
    print("\n".join(lines))
    if sessions := read_sessions(options.run_dir):
        print(f"\n{table(account(sessions))}")


if __name__ == "__main__":
    cli.run(main)
