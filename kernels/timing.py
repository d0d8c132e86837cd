"""How long a call takes on a device, where starting it may take longer than the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

LEAST_SECONDS = 0.05
"""Of calls in a row, so that starting them and the clock do not count."""


def calls_in_a_row(run: Callable[[], Any]) -> int:
    """How many of a compiled call take some 50 ms, at most 100."""
    return max(1, min(100, round(LEAST_SECONDS / seconds_a_call(run, 1))))


def seconds_a_call(run: Callable[[], Any], calls: int) -> float:
    """Seconds of each of so many calls in a row, waited for once."""
    started = time.perf_counter()
    outputs = None
    for _ in range(calls):
        outputs = run()
    jax.block_until_ready(outputs)
    return (time.perf_counter() - started) / calls
