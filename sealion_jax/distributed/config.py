"""How a process finds the others, as its command was told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

AUTO, NONE, SLURM, GKE, TPU_VM, OPEN_MPI = "auto", "none", "slurm", "gke", "tpu-vm", "open-mpi"
CLUSTERS = (AUTO, NONE, SLURM, GKE, TPU_VM, OPEN_MPI)
ClusterChoice = Literal["auto", "none", "slurm", "gke", "tpu-vm", "open-mpi"]

TOGETHER = "give all of --coordinator-address, --num-processes and --process-id, or none of them"


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process finds the others; with nothing set, as the cluster says in which it was started."""

    coordinator_address: str | None = None
    """host:port of process 0. Alone, it takes the place of the one that the cluster would give."""
    num_processes: int | None = None
    process_id: int | None = None
    cluster: ClusterChoice = "auto"
    """Where to look: auto looks everywhere, none nowhere, and the name of one kind insists on it."""
    join_timeout_seconds: int = 300
    """All processes have to be there by then; the missing ones are named."""
    heartbeat_timeout_seconds: int = 30
    """A process that was not heard of for so long counts as dead, and JAX ends the others."""
    expect_local_devices: int | None = None
    """Devices that each process has to see; None asks the scheduler, if it tells."""

    def __post_init__(self) -> None:
        if (self.num_processes is None) != (self.process_id is None):
            raise UserError(TOGETHER)
        if self.num_processes is not None and self.coordinator_address is None:
            raise UserError(TOGETHER)
        if self.cluster not in CLUSTERS:
            raise UserError(f"--cluster {self.cluster}: there is no such kind; known: {', '.join(CLUSTERS)}")
        if self.num_processes is not None and self.cluster != AUTO:
            raise UserError(
                f"--cluster {self.cluster} and --num-processes: who is told how many there are asks no "
                "scheduler; leave one of them out"
            )
        for name, least in (
            ("num_processes", 1),
            ("process_id", 0),
            ("join_timeout_seconds", 1),
            # Heartbeats come at a fraction of this; shorter, a busy host's would be missed.
            ("heartbeat_timeout_seconds", 5),
            ("expect_local_devices", 1),
        ):
            if getattr(self, name) is not None:
                check_number(f"--{name.replace('_', '-')}", getattr(self, name), least=least, whole=True)
        if self.coordinator_address is not None:
            split_address(self.coordinator_address)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port".

    Raises:
        UserError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"coordinator address {address!r} is not host:port; expected for example node1:12345, the host "
            "on which process 0 runs and a port that is free there"
        )
    return host, int(port)
