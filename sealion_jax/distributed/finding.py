"""Finding the cluster that a process was started in, from its environment alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from sealion_jax.distributed.cluster import Cluster, whole
from sealion_jax.distributed.config import (
    AUTO,
    GKE,
    NONE,
    OPEN_MPI,
    SLURM,
    TOGETHER,
    TPU_VM,
    DistributedConfig,
)
from sealion_jax.distributed.slurm import NEEDED, note_on_lone_process, port_of, slurm_cluster
from sealion_jax.distributed.tpu import Metadata, gke_cluster, tpu_vm_cluster
from sealion_jax.errors import UserError

_LOOKS_FOR = {
    SLURM: f"{', '.join(NEEDED)}, which srun sets for its tasks",
    GKE: "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, which GKE sets in pods that ask for TPUs",
    TPU_VM: "a TPU, and a metadata server that knows agent-worker-number",
    OPEN_MPI: "OMPI_COMM_WORLD_SIZE and OMPI_COMM_WORLD_RANK, which mpirun sets",
}


def find_cluster(
    environ: Mapping[str, str], config: DistributedConfig, *, metadata: Metadata | None = None
) -> Cluster | None:
    """The run's processes and this one's place among them, or None where no scheduler knows of any.

    Args:
        metadata: reads a Cloud TPU VM's attributes; None where this machine is none.

    Raises:
        UserError: the kind that was asked for is not there, or what it says makes no sense.
    """
    if config.coordinator_address is not None and config.num_processes is not None:
        return _flags(config)
    cluster = _find(environ, config, metadata)
    if config.coordinator_address is not None:
        if cluster is None:
            raise UserError(f"{TOGETHER}: no cluster was found that would tell the other two")
        return dataclasses.replace(cluster, coordinator_address=config.coordinator_address)
    if cluster is not None and cluster.num_processes > 1 and not cluster.coordinator_address:
        raise UserError(
            "this version of Open MPI does not say where process 0 runs; give --coordinator-address "
            "HOST:PORT, the first host of the hostfile and a port that is free there"
        )
    return cluster


def note_on_lone(environ: Mapping[str, str], config: DistributedConfig) -> str | None:
    """A line for the user where a process trains alone that was perhaps not meant to; else None."""
    return note_on_lone_process(environ) if config.cluster in (AUTO, SLURM) else None


def _find(environ: Mapping[str, str], config: DistributedConfig, metadata: Metadata | None) -> Cluster | None:
    """What the first scheduler says that knows this process, of those that are asked for."""
    finders = {
        SLURM: lambda: slurm_cluster(environ),
        GKE: lambda: gke_cluster(environ),
        TPU_VM: lambda: None if metadata is None else tpu_vm_cluster(metadata, environ),
        OPEN_MPI: lambda: _open_mpi(environ),
    }
    if config.cluster == NONE:
        return None
    if config.cluster != AUTO:
        found = finders[config.cluster]()
        if found is None:
            raise UserError(
                f"--cluster {config.cluster}: this process was not started by one; looked for "
                f"{_LOOKS_FOR[config.cluster]}. Leave --cluster out to train on this machine alone"
            )
        return found
    return next((found for find in finders.values() if (found := find()) is not None), None)


def _flags(config: DistributedConfig) -> Cluster:
    """What the command's own options say."""
    assert config.coordinator_address is not None
    assert config.num_processes is not None
    assert config.process_id is not None
    return Cluster(
        kind="flags",
        name="flags",
        coordinator_address=config.coordinator_address,
        num_processes=config.num_processes,
        process_id=config.process_id,
    )


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """The processes that one mpirun started; up to version 4 it says on which host, as JAX finds it too."""
    size, rank = environ.get("OMPI_COMM_WORLD_SIZE"), environ.get("OMPI_COMM_WORLD_RANK")
    if not size or not rank:
        return None
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(\d+)\.\d+;(?:tcp://([^,:;]+)|tcp6://\[([^,\];]+))", uri)
    address = ""
    if match is not None:
        job, host = match[1], match[2] or f"[{match[3]}]"
        # The number is a multiple of 2^16 for each mpirun.
        address = f"{host}:{port_of(int(job) >> 16, '0', 0)}"
    own = whole(environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or "0", "OMPI_COMM_WORLD_LOCAL_RANK")
    several = whole(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1", "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
    return Cluster(
        kind="open-mpi",
        name="Open MPI",
        word=f"open-mpi {environ.get('PMIX_NAMESPACE', '')}",
        coordinator_address=address,
        num_processes=whole(size, "OMPI_COMM_WORLD_SIZE"),
        process_id=whole(rank, "OMPI_COMM_WORLD_RANK"),
        # Several on a node take a GPU each; the only one takes all.
        visible_devices=(own,) if several else None,
    )
