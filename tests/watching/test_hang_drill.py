"""Drills with the real command: a process is stopped or killed, all end within the limit, the run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import command_environment, start_together
from tests.tiny_run import losses_of, make_world

STEPS = 20
LIMIT_SECONDS = 20
OPTIONS = (
    *("--steps", STEPS, "--global-batch-size", 12, "--mesh.data", 3, "--mesh.fsdp", 1),
    *("--evaluation.sets", "none", "--checkpoints.interval-steps", 3, "--logging.interval-steps", 1),
    *("--watch.beat-seconds", 0.5, "--watch.silent-seconds", 3),
)

pytestmark = pytest.mark.slow


class Drill:
    """One run of three processes, started again and again by the same command."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._recipe = make_world(folder).recipe
        self._environment = command_environment(cache=folder / "compiled")
        self.processes: list[subprocess.Popen[str]] = []
        self.outputs: list[str] = []

    def start(self, run_dir: Path | None = None) -> None:
        self.processes = start_together(
            "train",
            *(self._recipe, "--run-dir", run_dir or self.run_dir, *OPTIONS),
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

    def hangs(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "hangs.jsonl").read_text().splitlines()]

    def stacks(self, process: int) -> str:
        return (self.run_dir / "heartbeats" / f"{process}.stacks.txt").read_text()

    def _losses(self) -> dict[int, float]:
        try:
            return losses_of(self.run_dir)
        except (FileNotFoundError, ValueError):  # not there, or in the midst of a line
            return {}


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    drill = Drill(tmp_path, tmp_path / "run")
    yield drill
    drill.end()


def test_stopped_and_killed_processes_end_all_and_the_run_goes_on_bit_for_bit(drill, tmp_path):
    """Two drills in one run: process 1 is stopped; then process 0 is stopped, and process 2 killed."""
    drill.start(tmp_path / "undisturbed")
    assert drill.codes(180) == [0, 0, 0], drill.outputs

    for victims, after in (({1: signal.SIGSTOP}, 5), ({0: signal.SIGSTOP, 2: signal.SIGKILL}, 14)):
        others = [number for number in range(3) if number not in victims]
        drill.start()
        drill.wait_for_step(after)
        pids = [process.pid for process in drill.processes]
        for victim, sent in victims.items():
            drill.processes[victim].send_signal(sent)
        codes = drill.codes(LIMIT_SECONDS)

        # A stopped process was killed by the others, which end with an error that is not the user's.
        assert all(codes[victim] == -signal.SIGKILL for victim in victims)
        assert all(codes[number] not in (0, 2) for number in others), codes
        hang = drill.hangs()[-1]
        assert hang["silent"] == sorted(victims)
        for victim, line in zip(sorted(victims), hang["lines"][1:], strict=False):
            assert line.startswith(f"  process {victim} (pid {pids[victim]} on ")
            assert ("is stopped (SIGSTOP)" if victims[victim] == signal.SIGSTOP else "is dead") in line
            assert line in drill.outputs[min(others)]
        for number in others:
            assert str(drill.run_dir / "heartbeats" / f"{number}.stacks.txt") in drill.outputs[number]
        if len(victims) == 1:  # no connection was broken: the others' main threads are where they wait
            assert all("sealion_jax/training/loop.py" in drill.stacks(number) for number in others)

    assert len(drill.hangs()) == 2
    drill.start()
    assert drill.codes(180) == [0, 0, 0], drill.outputs
    assert "resuming after step" in drill.outputs[0]
    losses = losses_of(drill.run_dir)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == losses_of(tmp_path / "undisturbed")
