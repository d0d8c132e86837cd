"""Under which of goodput's kinds the time is booked that a run takes for what it does."""

from __future__ import annotations

from sealion_jax.goodput import STEPS
from sealion_jax.watching import READING, Doing

_KINDS = {
    "starting": "start",
    "building": "start",
    "restoring": "restore",
    "going back": "restore",
    "compiling": "compile",
    "evaluating": "evaluation",
    "sampling": "evaluation",
    "saving": "save",
    "finishing the last save": "save",
}
"""By what a run tells its watch that it does."""


def kind_of(doing: Doing) -> str:
    """Goodput's kind of the time that something takes."""
    if doing.what.endswith(READING):
        return "data"
    return STEPS if doing.is_step else _KINDS.get(doing.what, "other")
