"""What a process knows about the run that it is a part of, before it has spoken with the others."""

from __future__ import annotations

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
