"""Whether every process of a run can write its directory: asked first of all, not at the first save."""

from __future__ import annotations

import contextlib
import socket

import jax

from sealion_jax.checkpoint.processes import all_lines, num_processes, on_first_process
from sealion_jax.errors import UserError
from sealion_jax.storage import writable

_MOST_LINES = 8


def require_writable_by_all(run_dir: str) -> None:
    """Raises UserError on all processes unless each can write, read and remove a file; all call it together.

    Process 0 goes first: what no process can do is told once.
    """
    with contextlib.ExitStack() as ending:
        # Folders that were made for it stay until all are done, or one would take them from under another.
        on_first_process(lambda: ending.enter_context(writable(run_dir)))
        problem = ""
        if num_processes() > 1 and jax.process_index() != 0:
            try:
                ending.enter_context(writable(run_dir))
            except UserError as error:
                problem = f"process {jax.process_index()} on {socket.gethostname()}: {error}"
        problems = [line for line in all_lines([problem]) if line]
    if problems:
        more = len(problems) - _MOST_LINES
        rest = [f"and {more} more processes"] if more > 0 else []
        raise UserError("\n".join([*problems[:_MOST_LINES], *rest]))
