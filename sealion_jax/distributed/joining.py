"""Joining a run's processes: they gather, compare what they are about to do, and then JAX connects them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import jax

from sealion_jax.distributed.cluster import Cluster
from sealion_jax.distributed.code_version import code_versions, settings
from sealion_jax.distributed.config import AUTO, TPU_VM, DistributedConfig, split_address
from sealion_jax.distributed.devices import (
    DEVICES_SECONDS,
    Devices,
    check_devices,
    describe_devices,
    exchange_devices,
    limited,
    no_device,
    odd_hosts,
    see_devices,
)
from sealion_jax.distributed.finding import find_cluster, note_on_lone
from sealion_jax.distributed.gpus import num_gpus
from sealion_jax.distributed.meeting import CONNECT_SECONDS, meet
from sealion_jax.distributed.tpu import Metadata, read_metadata
from sealion_jax.distributed.words import Introduction
from sealion_jax.errors import Preempted, UserError

_METADATA_HOST = "metadata.google.internal"
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The run as its processes have found it."""

    cluster: Cluster | None = None
    """None: nobody was looked for, and nothing was started."""
    devices: tuple[Devices, ...] = ()
    """Of each process; empty where nobody counted."""

    @property
    def process(self) -> int:
        """This process's number."""
        return 0 if self.cluster is None else self.cluster.process_id

    @property
    def host(self) -> str:
        """What the scheduler calls this machine, or it calls itself."""
        return (self.cluster.node if self.cluster else None) or socket.gethostname()


def join(
    config: DistributedConfig,
    environ: MutableMapping[str, str] | None = None,
    *,
    facts: Mapping[str, str] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    blame: Callable[[Sequence[str]], None] = lambda _: None,
) -> Joined:
    """The run's processes, joined, if there are several; before anything else touches JAX.

    Processes on CPUs talk through gloo. A process that is alone starts nothing.

    Args:
        environ: the process's own environment, where schedulers say what they know; None: only `config` does.
        facts: what has to be the same for all, by its name.
        asked_to_stop: whether to give up waiting for the others.
        report: is given warnings, and on process 0 a line that says what was found.
        blame: is given the hosts whose devices are refused, on process 0, before all end.

    Raises:
        UserError: who is missing, or who differs, the same on all processes, within the time limit.
        Preempted: one of them was asked to stop.
    """
    environ = {} if environ is None else environ
    gpus = num_gpus() if any(map(find_spec, _CUDA_PLUGINS)) else None
    cluster = find_cluster(environ, config, metadata=_metadata(environ, config), gpus=gpus)
    if cluster is None or (cluster.num_processes == 1 and cluster.process_id == 0):
        return _alone(config, environ, cluster, report, blame)
    own = Introduction(
        process=cluster.process_id,
        processes=cluster.num_processes,
        host=cluster.node or socket.gethostname(),
        pid=os.getpid(),
        job=cluster.word,
        facts={**(facts or {}), **code_versions(), **settings(environ)},
        stop=asked_to_stop(),
    )
    verdict = meet(own, cluster, config, asked_to_stop)
    if verdict.verdict == "stop":
        raise Preempted(verdict.text)
    if verdict.verdict == "refused":
        raise UserError(verdict.text)
    is_first = cluster.process_id == 0
    for line in verdict.warnings if is_first else ():
        report(line)
    _choose_devices(cluster, environ)
    _avoid_proxy(cluster, environ)
    _connect(cluster, config)
    devices = exchange_devices(
        lambda: see_devices(cluster, host=own.host, expected=config.expect_local_devices),
        cluster,
        host=own.host,
        limit_seconds=DEVICES_SECONDS,
        blame=blame,
    )
    odd = odd_hosts(devices)
    if odd and is_first:
        blame(odd)
    check_devices(devices)
    if is_first:
        report(f"{cluster.name}: {describe_devices(devices)}, coordinator {cluster.coordinator_address}")
    return Joined(cluster=cluster, devices=tuple(devices))


def _alone(
    config: DistributedConfig,
    environ: MutableMapping[str, str],
    cluster: Cluster | None,
    report: Callable[[str], None],
    blame: Callable[[Sequence[str]], None],
) -> Joined:
    """A run of one process; only where its devices were counted before are they counted again."""
    note = note_on_lone(environ, config) if cluster is None else None
    if note is not None:
        report(f"warning: {note}")
    expected = config.expect_local_devices
    if cluster is None and expected is not None:
        cluster = Cluster(kind="flags", name="", coordinator_address="", num_processes=1, process_id=0)
    if cluster is None or (expected is None and cluster.expected_devices is None):
        return Joined(cluster=cluster)
    _choose_devices(cluster, environ)
    host = cluster.node or socket.gethostname()
    try:
        with limited(DEVICES_SECONDS):
            devices = see_devices(cluster, host=host, expected=expected)
    except Exception as error:  # JAX raises many kinds
        blame([host])
        raise UserError(f"this process {no_device(error)}") from error
    if odd_hosts([devices]):
        blame([host])
    check_devices([devices])
    return Joined(cluster=cluster, devices=(devices,))


def _connect(cluster: Cluster, config: DistributedConfig) -> None:
    """Starts JAX's service on process 0, and connects this process to it."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with _bounded(cluster):
        try:
            jax.distributed.initialize(
                cluster.coordinator_address,
                cluster.num_processes,
                cluster.process_id,
                local_device_ids=cluster.visible_devices,
                # By JAX's own detection even the only process of a Slurm node would take one GPU alone.
                cluster_detection_method="deactivate",
                initialization_timeout=config.join_timeout_seconds + CONNECT_SECONDS,
                heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
            )
        except RuntimeError as error:
            raise UserError(
                f"process {cluster.process_id} could not join at {cluster.coordinator_address}, though all "
                f"were there a moment ago: {' '.join(str(error).split())}"
            ) from error


@contextlib.contextmanager
def _bounded(cluster: Cluster) -> Iterator[None]:
    """Ends the process if the block takes too long: JAX would end it with SIGABRT and a stack of C++."""

    def end() -> None:
        print(
            f"process {cluster.process_id} waited {CONNECT_SECONDS} s for JAX's service at "
            f"{cluster.coordinator_address}, though all processes were there a moment ago: one has ended "
            "since. Run me again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(CONNECT_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _choose_devices(cluster: Cluster, environ: Mapping[str, str]) -> None:
    """Where the scheduler gave GPUs, has JAX fail without them, and not go on with the CPU."""
    # The others would wait for this process's part of the GPUs' topology.
    given_gpus = cluster.expected_platform == "gpu" and any(map(find_spec, _CUDA_PLUGINS))
    if given_gpus and not environ.get("JAX_PLATFORMS") and not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cuda,cpu")


def _avoid_proxy(cluster: Cluster, environ: MutableMapping[str, str]) -> None:
    """Has gRPC reach process 0 directly, also where web pages are reached through a proxy."""
    if not any(environ.get(name) for name in _PROXIES):
        return
    host, _ = split_address(cluster.coordinator_address)
    others = environ.get("no_grpc_proxy") or environ.get("no_proxy")
    environ["no_grpc_proxy"] = f"{others},{host}" if others else host
    jax.config.update("jax_check_proxy_envs", False)


def _metadata(environ: Mapping[str, str], config: DistributedConfig) -> Metadata | None:
    """A reader of this TPU VM's metadata, or None where this machine is none."""
    reader = read_metadata(environ.get("GCE_METADATA_IP") or _METADATA_HOST)
    if config.cluster == TPU_VM:
        return reader
    # JAX itself sets the variable where there is no TPU, and GKE sets it in pods.
    if config.cluster != AUTO or "TPU_SKIP_MDS_QUERY" in environ or find_spec("libtpu") is None:
        return None
    from jax._src import hardware_utils

    return reader if hardware_utils.num_available_tpu_chips_and_device_id()[0] else None
