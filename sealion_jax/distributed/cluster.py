"""What a process knows about the run that it is a part of, before it has spoken with the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sealion_jax.errors import UserError

ClusterKind = Literal["flags", "slurm", "gke-tpu", "cloud-tpu-vm", "open-mpi"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a run, and this one's place among them."""

    kind: ClusterKind
    name: str
    """For people: "slurm job 42 (restart 1)"."""
    word: str = ""
    """The same for all processes that were started together, and for no others, as far as can be told."""
    coordinator_address: str
    """host:port of process 0."""
    num_processes: int
    process_id: int
    node: str | None = None
    """What the scheduler calls this machine; None: the machine's own name counts."""
    nodes: tuple[str, ...] = ()
    """All machines of the run, where they are known."""
    hosts: tuple[str, ...] = ()
    """The machine of each process, where that is known."""
    job_id: str | None = None
    restarts: int = 0
    visible_devices: tuple[int, ...] | None = None
    """Numbers of the GPUs that this process takes; None: all that it sees."""
    expected_devices: int | None = None
    """So many devices were given to this process; None: nobody says."""
    expected_platform: Literal["gpu", "tpu"] | None = None
    expected_by: str = ""
    """Who says so."""


def whole(text: str, name: str) -> int:
    """The number that a scheduler's variable holds.

    Raises:
        UserError: it holds none; names the variable.
    """
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; expected a whole number, as the scheduler sets it")
    return int(text)


def check_place(number: int, of: int, *, number_name: str, of_name: str) -> None:
    """Refuses a number that is none of so many, which are counted from 0.

    Raises:
        UserError: names both of the scheduler's variables.
    """
    if of < 1:
        raise UserError(f"{of_name} is {of}; expected at least 1, as the scheduler sets it")
    if number >= of:
        raise UserError(
            f"{number_name} is {number}, but {of_name} says that there are {of}, numbered from 0 to "
            f"{of - 1}; pass on both as the scheduler sets them, or give "
            "--coordinator-address, --num-processes and --process-id"
        )


def half_told(scheduler: str, missing: str) -> UserError:
    """What is raised where a process is one of several, and cannot know which."""
    return UserError(
        f"{scheduler} started several processes, but {missing} is not set, so this one would train alone; "
        "pass on all that it sets (sudo, env and containers may drop some), give --coordinator-address, "
        "--num-processes and --process-id, or --cluster none to train alone"
    )


def job_set(environ: Mapping[str, str]) -> tuple[str | None, int]:
    """The JobSet of Kubernetes that this process belongs to, if any, and how often it was started again."""
    name = environ.get("JOBSET_NAME") or None
    attempt = environ.get("JOBSET_RESTART_ATTEMPT") or "0"
    return name, whole(attempt, "JOBSET_RESTART_ATTEMPT") if name else 0


def with_restarts(name: str, restarts: int) -> str:
    """ "slurm job 42 (restart 1)"."""
    return f"{name} (restart {restarts})" if restarts else name
