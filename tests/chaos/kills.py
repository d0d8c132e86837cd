"""A run that is killed again and again, at named points or at random moments, and started again each time."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.files import entry_names
from sealion_jax.data import files
from tests.commands import start_together

Point = Literal["starting", "compiling", "restoring", "saving", "stepping", "any moment"]
Victims = Literal["one", "first", "all"]

_IN_ORDER = ("building", "restoring", "compiling", "step")
"""What a run does at its start, as its heartbeats tell it."""

PROCESSES = 2
ALL_ENDED_SECONDS = 90
"""After a kill the others end within a minute; the rest is for machines that do other work too."""
REACHED_SECONDS = 240
"""In which a run comes to any point."""
FINISH_SECONDS = 1200
"""In which it comes to its end, with forty saves in a bucket that refuses and delays."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL at a point of a run's start or training."""

    point: Point
    victims: Victims


def random_kills(count: int, *, seed: int) -> list[Kill]:
    """Every point and every choice of victims in turn, then whatever chance brings; in a random order."""
    chance = random.Random(seed)
    every = [Kill(point=point, victims=who) for point in get_args(Point) for who in get_args(Victims)]
    kills = (every * -(-count // len(every)))[:count]
    chance.shuffle(kills)
    return kills


class Run:
    """A run of `PROCESSES` processes in one run directory, local or gs://."""

    def __init__(
        self, recipe: str, run_dir: str, options: Sequence[object], environment: Mapping[str, str]
    ) -> None:
        self._recipe = recipe
        self.run_dir = run_dir
        self._options = options
        self._environment = dict(environment)
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Starts all processes."""
        self._processes = start_together(
            "train",
            *(self._recipe, "--run-dir", self.run_dir, *self._options),
            processes=PROCESSES,
            environment=self._environment,
        )
        self._started = time.monotonic()

    def finish(self) -> str:
        """What process 0 says when the run is left alone, to its end."""
        self.start()
        try:
            outputs = [process.communicate(timeout=FINISH_SECONDS)[0] for process in self._processes]
        finally:
            self._kill(self._processes)
        codes = [process.returncode for process in self._processes]
        assert codes == [0] * PROCESSES, (codes, outputs)
        return outputs[0]

    def disturb(self, kill: Kill, chance: random.Random) -> float | None:
        """Starts the run and kills as told; seconds in which the others ended, None if it came to its end.

        Raises:
            AssertionError: one of the others lives on, or says that it is the user's mistake.
        """
        self.start()
        try:
            if not self._wait_for(kill.point, chance):
                return None
            victims = self._processes
            if kill.victims != "all":
                victims = [self._processes[0 if kill.victims == "first" else chance.randrange(PROCESSES)]]
            have_joined = any(map(self._is_of_now, self._beats()))
            self._kill(victims)
            killed = time.monotonic()
            outputs = [process.communicate(timeout=ALL_ENDED_SECONDS)[0] for process in self._processes]
            ended = time.monotonic() - killed
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"after {kill} not all ended in {ALL_ENDED_SECONDS} s") from error
        finally:
            self._kill(self._processes)
        codes = [process.returncode for process in self._processes]
        # Whoever waits for a process that was killed before it joined cannot know that it was there at all.
        wrong = (75,) if not have_joined else (2, 75)
        assert all(code not in wrong for code in codes), (kill, codes, outputs)
        return ended

    def _wait_for(self, point: Point, chance: random.Random) -> bool:
        """Waits until the run is there, and a moment more; False if it ended before."""
        ahead = chance.randrange(1, 5)
        at = chance.uniform(0, 15)
        deadline = time.monotonic() + REACHED_SECONDS
        first: int | None = None
        while True:
            if first is None and self._step():
                first = self._step()
            if self._is_at(point, None if first is None else first + ahead, at):
                break
            if any(process.poll() is not None for process in self._processes):
                outputs = [process.communicate(timeout=ALL_ENDED_SECONDS)[0] for process in self._processes]
                codes = [process.returncode for process in self._processes]
                assert codes == [0] * PROCESSES, (point, codes, outputs)
                return False
            assert time.monotonic() < deadline, f"the run did not come to {point}"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        return True

    def _is_at(self, point: Point, step: int | None, seconds: float) -> bool:
        if point == "any moment":
            return time.monotonic() - self._started > seconds
        if point == "stepping":
            return step is not None and self._step() >= step
        if point == "saving":
            return any(self._is_being_saved(name) for name in entry_names(f"{self.run_dir}/checkpoints"))
        # Heartbeats come now and then: what is over by the next one counts as well.
        later = _IN_ORDER[_IN_ORDER.index({"starting": "building"}.get(point, point)) :]
        return any(beat["doing"].startswith(later) and self._is_of_now(beat) for beat in self._beats())

    def _is_being_saved(self, name: str) -> bool:
        """Whether it is the mark of a step that the run has come to, and not one that a killed run left."""
        step, _, rest = name.partition(".")
        return rest == "unfinished" and self._step() >= int(step) - 1

    def _is_of_now(self, beat: Mapping[str, Any]) -> bool:
        return beat["pid"] in [process.pid for process in self._processes]

    def _step(self) -> int:
        """Steps that are done, as the processes that live now say."""
        return max((beat["step"] or 0 for beat in self._beats() if self._is_of_now(beat)), default=0)

    def _beats(self) -> Iterator[dict[str, Any]]:
        for name in entry_names(f"{self.run_dir}/heartbeats"):
            if name.partition("-")[0].isdecimal():
                try:
                    yield json.loads(files.read_bytes(f"{self.run_dir}/heartbeats/{name}"))
                except (FileNotFoundError, ValueError):
                    continue

    @staticmethod
    def _kill(processes: Sequence[subprocess.Popen[str]]) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)

    def losses(self) -> dict[int, float]:
        """Step -> loss, every bit of it."""
        rows = map(json.loads, files.read_bytes(f"{self.run_dir}/metrics.jsonl").decode().splitlines())
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


def different_arrays(one: str, other: str, step: int) -> list[str]:
    """Names of the weights of a step that are not bit for bit those of the other run's."""
    ours, theirs = (f"{run_dir}/checkpoints/{step}" for run_dir in (one, other))
    names = leaf_shapes(theirs)
    assert leaf_shapes(ours).keys() == names.keys()
    return [
        name
        for name in names
        if not np.array_equal(read_leaf(ours, name), read_leaf(theirs, name), equal_nan=True)
    ]
