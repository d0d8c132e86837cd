"""Finding the cluster that a process was started in, from its environment alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from sealion_jax.distributed.cluster import Cluster, check_place, half_told, job_set, whole, with_restarts
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
from sealion_jax.distributed.gpus import mpi_share
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
    environ: Mapping[str, str],
    config: DistributedConfig,
    *,
    metadata: Metadata | None = None,
    gpus: int | None = None,
) -> Cluster | None:
    """The run's processes and this one's place among them, or None where no scheduler knows of any.

    Args:
        metadata: reads a Cloud TPU VM's attributes; None where this machine is none.
        gpus: of this machine, where that is known and JAX can use them.

    Raises:
        UserError: the kind that was asked for is not there, or what it says makes no sense.
    """
    address, processes, process = config.coordinator_address, config.num_processes, config.process_id
    if address is not None and processes is not None and process is not None:
        return _flags(environ, address, processes, process)
    cluster = _find(environ, config, metadata, gpus)
    if address is not None:
        if cluster is None:
            raise UserError(f"{TOGETHER}: no cluster was found that would tell the other two")
        return dataclasses.replace(cluster, coordinator_address=address)
    if cluster is None:
        # The only pod of a JobSet belongs to one of its starts, too.
        return _flags(environ, "", 1, 0) if job_set(environ)[0] else None
    if cluster.num_processes > 1 and not cluster.coordinator_address:
        raise UserError(
            "this version of Open MPI does not say where process 0 runs; give --coordinator-address "
            "HOST:PORT, the first host of the hostfile and a port that is free there"
        )
    return cluster


def note_on_lone(environ: Mapping[str, str], config: DistributedConfig) -> str | None:
    """A line for the user where a process trains alone that was perhaps not meant to; else None."""
    return note_on_lone_process(environ) if config.cluster in (AUTO, SLURM) else None


def _find(
    environ: Mapping[str, str], config: DistributedConfig, metadata: Metadata | None, gpus: int | None
) -> Cluster | None:
    """What the first scheduler says that knows this process, of those that are asked for."""
    finders = {
        # Before Slurm, as in JAX: mpirun starts one task of Slurm on each node, and the processes in it.
        OPEN_MPI: lambda: _open_mpi(environ, gpus),
        SLURM: lambda: slurm_cluster(environ),
        GKE: lambda: gke_cluster(environ),
        TPU_VM: lambda: None if metadata is None else tpu_vm_cluster(metadata, environ),
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


def _flags(environ: Mapping[str, str], address: str, processes: int, process: int) -> Cluster:
    """What the command's own options say, and of a JobSet's pods which start this is."""
    job, restarts = job_set(environ)
    return Cluster(
        kind="flags",
        name=with_restarts(f"JobSet {job}" if job else "flags", restarts),
        word=f"JobSet {job} restart {restarts}" if job else "",
        coordinator_address=address,
        num_processes=processes,
        process_id=process,
        job_id=job,
        restarts=restarts,
    )


def _open_mpi(environ: Mapping[str, str], gpus: int | None) -> Cluster | None:
    """The processes that one mpirun started; up to version 4 it says on which host, as JAX finds it too."""
    size, rank = environ.get("OMPI_COMM_WORLD_SIZE"), environ.get("OMPI_COMM_WORLD_RANK")
    if not size and not rank:
        return None
    if not size or not rank:
        if size == "1":
            return None
        raise half_told("mpirun", "OMPI_COMM_WORLD_SIZE" if not size else "OMPI_COMM_WORLD_RANK")
    processes, number = whole(size, "OMPI_COMM_WORLD_SIZE"), whole(rank, "OMPI_COMM_WORLD_RANK")
    check_place(number, processes, number_name="OMPI_COMM_WORLD_RANK", of_name="OMPI_COMM_WORLD_SIZE")
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(\d+)\.\d+;(?:tcp://([^,:;]+)|tcp6://\[([^,\];]+))", uri)
    address = ""
    if match is not None:
        job, host = match[1], match[2] or f"[{match[3]}]"
        # The number is a multiple of 2^16 for each mpirun.
        address = f"{host}:{port_of(int(job) >> 16, '0', 0)}"
    visible, expected = mpi_share(
        environ,
        on_node=gpus,
        tasks=whole(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        number=whole(environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or "0", "OMPI_COMM_WORLD_LOCAL_RANK"),
    )
    return Cluster(
        kind="open-mpi",
        name="Open MPI",
        word=f"open-mpi {environ.get('PMIX_NAMESPACE', '')}",
        coordinator_address=address,
        num_processes=processes,
        process_id=number,
        visible_devices=visible,
        expected_devices=expected,
        expected_platform=None if expected is None else "gpu",
        expected_by="CUDA_VISIBLE_DEVICES" if environ.get("CUDA_VISIBLE_DEVICES") else "NVIDIA's driver",
    )
