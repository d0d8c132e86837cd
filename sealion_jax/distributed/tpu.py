"""What GKE and Cloud TPU tell a process about its slice, and about the other slices of a run.

GKE sets variables in every pod that asks for TPUs (cloud.google.com/kubernetes-engine/docs/concepts/tpus);
JobSet adds the MEGASCALE ones where there are several slices. A Cloud TPU VM has them in its metadata
(`tpu-env`, `agent-worker-number` and `worker-network-endpoints`), as jax/_src/clusters/cloud_tpu_cluster.py
reads them.
"""

from __future__ import annotations

import math
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from sealion_jax.distributed.cluster import Cluster, ClusterKind, whole
from sealion_jax.errors import UserError

PORT = 8482
"""The one that JAX takes on TPUs, so firewalls that let JAX through let this through."""

Metadata = Callable[[str], str | None]
"""The value of one of a Cloud TPU VM's attributes, or None if it has none of that name."""


def gke_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """The slices that this pod is a part of, or None if it is in no TPU node pool of GKE."""
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not workers or not environ.get("TPU_WORKER_ID"):
        return None
    attempt = environ.get("JOBSET_RESTART_ATTEMPT") or "0"
    job = environ.get("JOBSET_NAME")
    restarts = int(attempt) if attempt.isdecimal() else 0
    return _slices(
        environ,
        kind="gke-tpu",
        name=f"GKE TPU{f' {job}' if job else ''}" + (f" (restart {restarts})" if restarts else ""),
        workers=tuple(worker.split(":")[0] for worker in workers.split(",")),
        worker=whole(environ["TPU_WORKER_ID"], "TPU_WORKER_ID"),
        job=job,
        restarts=restarts,
        chips=_chips(environ.get("TPU_CHIPS_PER_HOST_BOUNDS")),
    )


def tpu_vm_cluster(metadata: Metadata, environ: Mapping[str, str]) -> Cluster | None:
    """The slices that this TPU VM is a part of, or None if its metadata say nothing about workers."""
    number, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    settings = _tpu_env(metadata("tpu-env") or "")
    # What is set in the environment wins, as in JAX.
    known = settings | {name: value for name, value in environ.items() if name.startswith("MEGASCALE_")}
    # Each is a host's address, or (older) name:id:address.
    workers = tuple(one.split(":")[-1] for one in endpoints.split(","))
    name = settings.get("NODE_ID")
    return _slices(
        known,
        kind="cloud-tpu-vm",
        name=f"Cloud TPU {name}" if name else "Cloud TPU VM",
        workers=workers,
        worker=whole(number, "agent-worker-number"),
        job=name,
        restarts=0,
        chips=_chips(settings.get("CHIPS_PER_HOST_BOUNDS")),
    )


def read_metadata(host: str, *, patience_seconds: float = 10.0) -> Metadata:
    """A reader of this machine's attributes from a metadata server; asks again while it does not answer.

    Raises (the reader does):
        UserError: it does not answer.
    """

    def read(key: str) -> str | None:
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        # The metadata server is a link-local address: no proxy stands before it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                with opener.open(request, timeout=patience_seconds) as answer:
                    return answer.read(1 << 20).decode().strip()
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                problem: Exception = error
            except OSError as error:
                problem = error
            if time.monotonic() > deadline:
                raise UserError(
                    f"the metadata server did not give {key} ({problem}); it tells a Cloud TPU VM who its "
                    "neighbours are. Give --coordinator-address, --num-processes and --process-id, or "
                    "--cluster none to train on this machine alone"
                )
            time.sleep(0.5)

    return read


def _slices(
    settings: Mapping[str, str],
    *,
    kind: ClusterKind,
    name: str,
    workers: tuple[str, ...],
    worker: int,
    job: str | None,
    restarts: int,
    chips: int | None,
) -> Cluster:
    """This slice and the others; workers of slice 0 come first, and its first one is process 0."""
    num_slices = whole(settings.get("MEGASCALE_NUM_SLICES") or "1", "MEGASCALE_NUM_SLICES")
    own_slice = whole(settings.get("MEGASCALE_SLICE_ID") or "0", "MEGASCALE_SLICE_ID")
    first = (settings.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    several = f", {num_slices} slices" if num_slices > 1 else ""
    return Cluster(
        kind=kind,
        name=f"{name}{several}",
        word=f"{kind} {job or first} restart {restarts}",
        coordinator_address=f"{first}:{PORT}",
        num_processes=len(workers) * num_slices,
        process_id=own_slice * len(workers) + worker,
        node=socket.gethostname() if worker >= len(workers) else workers[worker],
        # Of other slices only the number of workers is known.
        nodes=workers if num_slices == 1 else (),
        hosts=workers if num_slices == 1 else (),
        job_id=job,
        restarts=restarts,
        expected_devices=chips,
        expected_platform="tpu" if chips else None,
        expected_by="the slice (chips per host)",
    )


def _tpu_env(text: str) -> dict[str, str]:
    """The settings of lines such as MEGASCALE_NUM_SLICES: '2'."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip().strip("'\"") for key, colon, value in pairs if colon}


def _chips(bounds: str | None) -> int | None:
    """Chips of a host from "2,2,1"; None where that is not told."""
    if not bounds or not re.fullmatch(r"\d+(,\d+)*", bounds):
        return None
    return math.prod(int(size) for size in bounds.split(","))
