"""SIGTERM: heard from the first moment on, and by all processes of a run at the same one."""

from __future__ import annotations

import signal
import subprocess
import sys

import jax
import pytest
from jax.experimental import multihost_utils

from sealion_jax.stopping import StopRequest
from tests.commands import command_environment, free_port


@pytest.fixture
def stop():
    before = signal.getsignal(signal.SIGTERM)
    yield StopRequest()
    signal.signal(signal.SIGTERM, before)


def test_a_moment_has_one_answer(stop):
    assert not stop.requested("built")
    signal.raise_signal(signal.SIGTERM)
    assert not stop.requested("built")
    assert stop.requested("begun")
    assert stop.requested(501)


def test_a_yes_of_all_processes_stays(stop, monkeypatch):
    """JAX's service says it for one moment, at which a run may go back instead of stopping."""
    asked: list[int] = []

    def says(number: int) -> bool:
        asked.append(number)
        return number == 3

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", says)
    answers = [stop.requested(moment) for moment in ("built", "begun", 501, 501, 401, 402)]
    assert answers == [False, False, True, True, True, True]
    assert asked == [1, 2, 3]


def test_the_request_is_made_before_jax_is_imported():
    code = "import sys; from sealion_jax import train; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Asks like a run that goes on after step 500; process 1 gets the signal at the moment of that name.
PROCESS = """
import signal, sys, time
from sealion_jax.stopping import StopRequest
from sealion_jax.distributed import DistributedConfig, join

address, number, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
stop = StopRequest()

def moment(name):
    if number == 1 and str(name) == when:
        signal.raise_signal(signal.SIGTERM)

moment("start")
join(DistributedConfig(coordinator_address=address, num_processes=2, process_id=number))
for asked in ("built", "begun", *range(501, 560)):
    if stop.requested(asked):
        print("stopped at", asked, flush=True)
        break
    moment(asked)
    # A signal takes about a second to be known to all: before the first step, or in the midst of some.
    time.sleep(2.5 if asked == "begun" else 0.1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "begun", "501"])
def test_two_processes_stop_at_the_same_moment(when):
    """One of them alone gets the signal: before they have joined, just before the first step, or after it."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number), when],
            env=command_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    told = [[line for line in output.splitlines() if line.startswith("stopped")] for output, _ in outputs]
    assert told[0] == told[1]
    assert len(told[0]) == 1
