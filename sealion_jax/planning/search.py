"""Meshes, microbatches and remat policies tried, and those that fit ranked by how fast they can be."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealion_jax.cli import EXIT_USER_ERROR, Progress
from sealion_jax.errors import UserError
from sealion_jax.machine import available_bytes
from sealion_jax.model.config import Gemma3Config
from sealion_jax.planning.candidates import Candidate, as_written, by_formulas, lighter, promising
from sealion_jax.planning.planner import plan
from sealion_jax.planning.step import SECONDS_BETWEEN_LINES
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import mesh_shape

BYTES_A_PROCESS = 8e9
"""Of memory, that compiling a large model's step takes."""
LAST_WORDS = 4000
"""Characters that are kept of what a process said that failed."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    reports: list[dict[str, Any]]
    """Ranked."""
    failed: list[dict[str, Any]]
    """Settings of candidates whose process gave no report, with its last words."""


class CandidateError(Exception):
    """A candidate's process ended without a report."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"ended with {code}: {said or 'it said nothing'}")
        self.code = code

    @property
    def last_line(self) -> str:
        """Of what it said."""
        return str(self).splitlines()[-1]


def rank(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that fit first, the fastest first: by the step with everything overlapped, then with nothing."""

    def order(report: dict[str, Any]) -> tuple[Any, ...]:
        if not report["fits"]:
            return (1, report["memory"]["exceeded_by"], 0.0)
        return (0, report["speed"]["overlapped"]["step_seconds"], report["speed"]["in_turn"]["step_seconds"])

    return sorted(reports, key=order)


def search(
    config: TrainConfig,
    model: Gemma3Config,
    topology: Topology,
    *,
    command: Sequence[str],
    most: int,
    processes: int | None,
    tell: Callable[[str], None],
) -> Found:
    """Reports on the recipe and the most promising candidates, ranked.

    While none fits, those that need less are compiled, `most` at a time.

    Args:
        command: the words of this search on the command line: recipe, topology and overrides. A process for
            each candidate is given them, with its own settings after.
        processes: that compile side by side; None takes what cores and memory allow.

    Raises:
        UserError: there is nothing to compile, or every process ended with a mistake of the user's.
        RuntimeError: every process failed.
    """
    ranked = by_formulas(config, model, topology)
    if not topology.is_tpu:  # formulas have the last word
        ranked = [one for one in ranked if one.needed <= one.available] or ranked
    try:
        recipe = as_written(config, model, topology)
    except UserError as error:
        recipe = None
        tell(f"the recipe as it is written is left out: {error}")
    chosen = promising(ranked, most=most, recipe=recipe)
    if not chosen:
        raise UserError(
            f"no mesh, number of microbatches and remat policy of {config.name} comes near to fitting on "
            f"{topology.describe()}; take a larger pod"
        )
    if not topology.is_tpu:
        tell(f"{len(chosen)} candidates, by formulas")
        return Found(
            reports=rank([plan(one.config, model, topology, tell=tell) for one in chosen]), failed=[]
        )
    workers = processes or default_processes()
    outcomes: list[tuple[Candidate, dict[str, Any] | CandidateError]] = []
    while chosen:
        tell(f"compiling {len(chosen)} candidates, {min(workers, len(chosen))} at once")
        new = list(_compiled(chosen, command, topology, workers))
        outcomes += new
        reports = [(one, report) for one, report in outcomes if not isinstance(report, CandidateError)]
        failed = [isinstance(outcome, CandidateError) for _, outcome in new]
        if all(failed) or any(report["fits"] for _, report in reports):
            break
        nearest = min(((one, _times(report)) for one, report in reports), key=lambda pair: pair[1])
        chosen = lighter(ranked, [one for one, _ in outcomes], nearest, most=most)
        if chosen:
            tell("none fits; going on to those that need less")
    failures = [(one, failure) for one, failure in outcomes if isinstance(failure, CandidateError)]
    if len(failures) == len(outcomes):
        _refuse([failure for _, failure in failures])
    return Found(
        reports=rank([report for _, report in outcomes if not isinstance(report, CandidateError)]),
        failed=[{**_settings(one.config, topology), "error": str(failure)} for one, failure in failures],
    )


def default_processes() -> int:
    """As many as there are cores, and memory for."""
    return max(1, min(os.cpu_count() or 1, int(available_memory() // BYTES_A_PROCESS)))


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that programs can have; where only those are told, the free ones."""
    known = available_bytes(meminfo)
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known is None else known)


def settings(config: TrainConfig) -> list[str]:
    """What a search varies, as words of the command line."""
    mesh = {f"mesh.{axis.name}": getattr(config.mesh, axis.name) for axis in dataclasses.fields(config.mesh)}
    values = {
        **mesh,
        "microbatches": config.microbatches,
        "rows_per_device": config.rows_per_device,
        "compute.remat": config.compute.remat,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _compiled(
    chosen: Sequence[Candidate], command: Sequence[str], topology: Topology, workers: int
) -> Iterator[tuple[Candidate, dict[str, Any] | CandidateError]]:
    """Each candidate with its report, or with its failure, as they end; progress is told meanwhile."""
    count = 0
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(len(chosen), "compiled", unit="candidates") as shown,
    ):
        waiting: dict[Future[dict[str, Any]], Candidate] = {
            pool.submit(_in_process, one.config, command): one for one in chosen
        }
        left = set(waiting)
        try:
            while left:
                done, left = wait(left, timeout=SECONDS_BETWEEN_LINES, return_when=FIRST_COMPLETED)
                for future in done:
                    one, outcome = waiting[future], _outcome(future)
                    count += 1
                    verdict = _verdict(outcome)
                    shown.say(f"{count}/{len(chosen)}: {_describe(one.config, topology)}: {verdict}")
                    yield one, outcome
                shown.update(len(done))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # of an interrupted search none begins any more


def _outcome(future: Future[dict[str, Any]]) -> dict[str, Any] | CandidateError:
    try:
        return future.result()
    except CandidateError as failure:
        return failure


def _in_process(config: TrainConfig, command: Sequence[str]) -> dict[str, Any]:
    """The report of a plan in a process of its own.

    Raises:
        CandidateError: there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        words = [sys.executable, "-m", "sealion_jax.plan", *command, *settings(config)]
        done = subprocess.run([*words, "--output", str(output)], capture_output=True, text=True, check=False)
        if not output.is_file():
            raise CandidateError(done.returncode, done.stderr[-LAST_WORDS:].strip())
        return json.loads(output.read_text())


def _refuse(failures: Sequence[CandidateError]) -> None:
    """Raises an error for all, with the last words of the first."""
    first = failures[0]
    if all(failure.code == EXIT_USER_ERROR for failure in failures):
        raise UserError(first.last_line.removeprefix("error: "))
    raise RuntimeError(f"all {len(failures)} candidates failed; the first one {first}") from first


def _times(report: dict[str, Any]) -> float:
    """How many times the memory that there is a step needs."""
    return report["memory"]["needed"] / report["memory"]["available"]


def _settings(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    """What a search varies, as reports have it."""
    return {
        "mesh": mesh_shape(config.mesh, topology.num_devices),
        "microbatches": config.microbatches,
        "remat": config.compute.remat,
    }


def _describe(config: TrainConfig, topology: Topology) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in mesh_shape(config.mesh, topology.num_devices).items())
    return f"{mesh}, microbatches {config.microbatches}, remat {config.compute.remat}"


def _verdict(report: dict[str, Any] | CandidateError) -> str:
    if isinstance(report, CandidateError):
        return f"failed: {report.last_line}"
    memory = report["memory"]
    if not report["fits"]:
        return f"does not fit, by {memory['exceeded_by'] / 2**30:.1f} GiB a chip"
    speed = report["speed"]
    return (
        f"{memory['needed'] / 2**30:.1f} GiB a chip, MFU at most {speed['overlapped']['mfu']:.1%}, "
        f"{speed['in_turn']['mfu']:.1%} with nothing overlapped"
    )
