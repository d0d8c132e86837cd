"""Drills with the real command: a process is stopped or killed, all end within the limit, the run goes on."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import command_environment, free_port, start_together
from tests.tiny_run import losses_of, make_world

STEPS = 24
LIMIT_SECONDS = 20
OPTIONS = (
    *("--steps", STEPS, "--global-batch-size", 12, "--mesh.data", 3, "--mesh.fsdp", 1),
    *("--evaluation.sets", "none", "--checkpoints.interval-steps", 3, "--logging.interval-steps", 1),
    *("--watch.beat-seconds", 0.5, "--watch.silent-seconds", 3),
)

pytestmark = pytest.mark.slow


class Drill:
    """Runs of three processes, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._recipe = make_world(folder).recipe
        self._environment = command_environment(cache=folder / "compiled")
        self.processes: list[subprocess.Popen[str]] = []
        self.outputs: list[str] = []

    def start(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.processes = start_together(
            "train",
            *(self._recipe, "--run-dir", run_dir, *OPTIONS),
            processes=3,
            environment=self._environment,
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while max(self._losses(), default=0) < step:
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.end()
            time.sleep(0.02)

    def codes(self, seconds: float) -> list[int]:
        """The exit codes of all, which must have ended in so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not all ended in {seconds} s: {self.end()}")
        self.end()
        return codes

    def end(self) -> list[str]:
        for process in self.processes:
            process.kill()
        if self.processes:
            self.outputs = [process.communicate()[0] for process in self.processes]
            self.processes = []
        return self.outputs

    def _losses(self) -> dict[int, float]:
        try:
            return losses_of(self._run_dir)
        except (FileNotFoundError, ValueError):  # not there, or in the midst of a line
            return {}


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    drill = Drill(tmp_path)
    yield drill
    drill.end()


def check_drill(drill: Drill, run_dir: Path, victims: dict[int, signal.Signals], *, after: int) -> None:
    """Starts the run, stops or kills the victims after a step; all end in time, and it is told who it was."""
    others = [number for number in range(3) if number not in victims]
    drill.start(run_dir)
    drill.wait_for_step(after)
    pids = [process.pid for process in drill.processes]
    for victim, sent in victims.items():
        drill.processes[victim].send_signal(sent)
    codes = drill.codes(LIMIT_SECONDS)

    # A stopped process was killed by the others, which end with an error that is not the user's.
    assert all(codes[victim] == -signal.SIGKILL for victim in victims)
    assert all(codes[number] not in (0, 2) for number in others), codes
    (hang,) = [json.loads(line) for line in (run_dir / "hangs.jsonl").read_text().splitlines()]
    assert hang["silent"] == sorted(victims)
    for victim, line in zip(sorted(victims), hang["lines"][1:], strict=False):
        assert line.startswith(f"  process {victim} (pid {pids[victim]} on ")
        assert ("is stopped (SIGSTOP)" if victims[victim] == signal.SIGSTOP else "is dead") in line
        assert line in drill.outputs[min(others)]
    for number in others:
        stacks = run_dir / "heartbeats" / f"{number}.stacks.txt"
        assert str(stacks) in drill.outputs[number]
        if signal.SIGKILL not in victims.values():  # which breaks connections, so that the others fail
            assert "sealion_jax/training/loop.py" in stacks.read_text()


def test_stopped_and_killed_processes_end_all_and_the_run_goes_on_bit_for_bit(drill, tmp_path):
    """One run in which process 1 is stopped; one, undisturbed up to then, in which 0 is and 2 is killed."""
    check_drill(drill, tmp_path / "other", {0: signal.SIGSTOP, 2: signal.SIGKILL}, after=STEPS - 5)
    check_drill(drill, tmp_path / "run", {1: signal.SIGSTOP}, after=5)
    drill.start(tmp_path / "run")
    assert drill.codes(180) == [0, 0, 0], drill.outputs
    assert "resuming after step" in drill.outputs[0]
    undisturbed, losses = losses_of(tmp_path / "other"), losses_of(tmp_path / "run")
    assert len(undisturbed) >= STEPS - 5
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert {step: losses[step] for step in undisturbed} == undisturbed


# One process of two meets a mistake of the user's while the other waits for it within XLA.
MISTAKEN = """
import sys, time
from sealion_jax import cli
from sealion_jax.distributed import DistributedConfig, join
from sealion_jax.errors import UserError
from sealion_jax.watching import Ends, Watch, WatchConfig

address, number, who, run_dir = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def main(argv):
    join(DistributedConfig(coordinator_address=address, num_processes=2, process_id=number))
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("both are there")
    watch = Watch(run_dir, WatchConfig(), process=number, processes=2, attempt="a", ends=Ends("a"))
    with watch as activity:
        activity.lease = 1
        if number == who:
            time.sleep(1)
            raise UserError("the disk is full")
        multihost_utils.sync_global_devices("the other comes too")

cli.run(main)
"""


def test_a_mistake_that_one_of_two_meets_ends_both_with_2(tmp_path):
    """In seconds, and not by JAX: it would take a minute, and abort one of them."""
    pairs = []
    for who in range(2):
        address, run_dir = f"127.0.0.1:{free_port()}", str(tmp_path / f"run-{who}")
        command = [sys.executable, "-c", MISTAKEN, address]
        pairs.append(
            [
                subprocess.Popen(
                    [*command, str(number), str(who), run_dir],
                    env=command_environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for number in range(2)
            ]
        )
    try:
        for who, pair in enumerate(pairs):
            told = [process.communicate(timeout=45)[0] for process in pair]
            assert [process.returncode for process in pair] == [2, 2], told
            assert "error: the disk is full\n" in told[who]
            assert f"error: process {who} (pid {pair[who].pid} on " in told[1 - who]
            assert told[1 - who].count("the disk is full") == 1
    finally:
        for process in itertools.chain(*pairs):
            process.kill()
