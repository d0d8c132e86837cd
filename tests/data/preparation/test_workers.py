"""Worker processes: results in order, and what goes wrong in one of them told where it belongs."""

from __future__ import annotations

import os
import signal
import time

import pytest

from sealion_jax.data.preparation.workers import ordered_map
from sealion_jax.errors import UserError


def make_worker(mode: str):
    def work(item: int) -> int:
        if item == 7 and mode == "user":
            raise UserError("row 7")
        if item == 7 and mode == "bug":
            raise KeyError("seven")
        if item == 7 and mode == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    return work


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    found = list(ordered_map(make_worker, ("well",), range(25), workers=workers))
    assert found == [(i, i * i) for i in range(25)]


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("user", UserError, "row 7"),
        ("bug", RuntimeError, r"KeyError: 'seven'"),
        ("dies", RuntimeError, "a worker process ended .*-9"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told(mode: str, kind: type[Exception], message: str) -> None:
    done = []
    with pytest.raises(kind, match=message):
        for pair in ordered_map(make_worker, (mode,), range(25), workers=2):
            done.append(pair)
    assert done == [(i, i * i) for i in range(7)], "what came before is not lost"
