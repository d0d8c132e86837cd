"""What GKE and Cloud TPU tell a process about its slice, and about the other slices of a run.

GKE sets variables in every pod that asks for TPUs (cloud.google.com/kubernetes-engine/docs/concepts/tpus);
JobSet adds the MEGASCALE ones where there are several slices. A Cloud TPU VM has them in its metadata
(`tpu-env`, `agent-worker-number` and `worker-network-endpoints`), as jax/_src/clusters/cloud_tpu_cluster.py
reads them.
"""

from __future__ import annotations

import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from sealion_jax.distributed.cluster import (
    Cluster,
    ClusterKind,
    check_place,
    half_told,
    job_set,
    whole,
    with_restarts,
)
from sealion_jax.errors import UserError

PORT = 8482
"""The one that JAX takes on TPUs, so firewalls that let JAX through let this through."""

_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_NUM_SLICES, _SLICE = "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"
_FIRST = "MEGASCALE_COORDINATOR_ADDRESS"

Metadata = Callable[[str], str | None]
"""The value of one of a Cloud TPU VM's attributes, or None if it has none of that name."""


def gke_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """The slices that this pod is a part of, or None if it is in no TPU node pool of GKE.

    Raises:
        UserError: it is one of several, and its environment does not tell all, or what cannot be.
    """
    names = next((name for name in _WORKERS if environ.get(name)), _WORKERS[-1])
    hosts, number = environ.get(names), environ.get("TPU_WORKER_ID")
    if not hosts and not number:
        return None
    workers = tuple(map(_host, hosts.split(","))) if hosts else ()
    worker = whole(number or "0", "TPU_WORKER_ID")
    if not hosts or not number:
        if max(len(workers), worker + 1, _product(environ.get("TPU_HOST_BOUNDS")) or 1) > 1:
            raise half_told("GKE", "TPU_WORKER_ID" if hosts else names)
        return None
    job, restarts = job_set(environ)
    return _slices(
        environ,
        kind="gke-tpu",
        name=with_restarts(f"GKE TPU{f' {job}' if job else ''}", restarts),
        workers=workers,
        worker=worker,
        told_by=("TPU_WORKER_ID", names),
        job=job,
        restarts=restarts,
        chips=_product(environ.get("TPU_CHIPS_PER_HOST_BOUNDS")),
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
        told_by=("agent-worker-number", "worker-network-endpoints"),
        job=name,
        restarts=0,
        chips=_product(settings.get("CHIPS_PER_HOST_BOUNDS")),
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
    told_by: tuple[str, str],
    job: str | None,
    restarts: int,
    chips: int | None,
) -> Cluster:
    """This slice and the others; workers of slice 0 come first, and its first one is process 0.

    Args:
        told_by: what gave the worker's number, and what gave all workers.
    """
    number_name, workers_name = told_by
    if not all(workers):
        raise UserError(f"{workers_name} names no host for some of its {len(workers)} workers")
    check_place(worker, len(workers), number_name=number_name, of_name=workers_name)
    num_slices = whole(settings.get(_NUM_SLICES) or "1", _NUM_SLICES)
    own_slice = whole(settings.get(_SLICE) or "0", _SLICE)
    if own_slice and not settings.get(_NUM_SLICES):
        raise half_told("the scheduler", _NUM_SLICES)
    check_place(own_slice, num_slices, number_name=_SLICE, of_name=_NUM_SLICES)
    missing = [name for name in (_SLICE, _FIRST) if not settings.get(name)]
    if num_slices > 1 and missing:
        raise half_told("the scheduler", missing[0])
    first = _host(settings.get(_FIRST) or workers[0])
    several = f", {num_slices} slices" if num_slices > 1 else ""
    return Cluster(
        kind=kind,
        name=f"{name}{several}",
        word=f"{kind} {job or first} restart {restarts}",
        coordinator_address=f"{first}:{PORT}",
        num_processes=len(workers) * num_slices,
        process_id=own_slice * len(workers) + worker,
        node=workers[worker],
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


def _host(address: str) -> str:
    """What stands before the port, if there is one: node1 of node1:8080, [fd00::2] of [fd00::2]:8080."""
    address = address.strip()
    if address.startswith("["):
        return address.partition("]")[0] + "]"
    return f"[{address}]" if address.count(":") > 1 else address.partition(":")[0]


def _product(bounds: str | None) -> int | None:
    """Chips of a host, or hosts of a slice, from "2,2,1"; None where that is not told."""
    if not bounds or not re.fullmatch(r"\d+(,\d+)*", bounds):
        return None
    return math.prod(int(size) for size in bounds.split(","))
