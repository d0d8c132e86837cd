"""Process 0 gathers the others, the others knock: one verdict for all."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from sealion_jax.distributed.cluster import Cluster
from sealion_jax.distributed.config import DistributedConfig, split_address
from sealion_jax.distributed.gathering import Gathering, PortTakenError
from sealion_jax.distributed.knocking import Knocking
from sealion_jax.distributed.words import Introduction, Verdict

CONNECT_SECONDS = 60
"""JAX's service connects processes that are all there within a second or two."""
_TOO_MANY_SECONDS = 1
"""A process whose number is too high tries for so long, and the grace of every knock, to tell the others."""


def meet(
    own: Introduction, cluster: Cluster, config: DistributedConfig, asked_to_stop: Callable[[], bool]
) -> Verdict:
    """The verdict of the gathering; after "go", JAX's service is found at the coordinator's address.

    Comes a few seconds after the time limit at the latest.
    """
    host, port = split_address(cluster.coordinator_address)
    knocking = Knocking(own=own, host=host, port=port, asked_to_stop=asked_to_stop)
    limit = config.join_timeout_seconds
    if own.process >= own.processes:
        # The others may hear of it before they begin; whatever comes of that, this one is one too many.
        verdict = knocking.run(min(limit, _TOO_MANY_SECONDS))
        return verdict if "numbered" in verdict.text else _too_many(own)
    if own.process == 0:
        gathering = Gathering(
            own=own, port=port, hosts=cluster.hosts, nodes=cluster.nodes, asked_to_stop=asked_to_stop
        )
        return _gather(gathering, knocking, limit)
    verdict = knocking.run(limit)
    if verdict.verdict == "go" and not knocking.wait_for_service(CONNECT_SECONDS):
        text = f"process 0 at {cluster.coordinator_address} was ready and then gone; look at its log"
        return Verdict(verdict="refused", text=text)
    return verdict


def _gather(gathering: Gathering, knocking: Knocking, limit_seconds: int) -> Verdict:
    """Process 0's verdict, once the port is free for it."""
    own, deadline = gathering.own, time.monotonic() + limit_seconds
    while True:
        try:
            verdict = gathering.run(max(deadline - time.monotonic(), 0), told_seconds=limit_seconds)
            break
        except PortTakenError:
            # By another process 0 of this run, which will say so; or by the run before this one, as it ends.
            told = knocking.knock(time.monotonic() + 1)
            if told is not None:
                return told
            if time.monotonic() > deadline:
                text = (
                    f"port {gathering.port} of {own.host} was in use by another program for {limit_seconds} "
                    "s, so process 0 could not wait for the others there; give --coordinator-address another "
                    "port, or end that program"
                )
                return Verdict(verdict="refused", text=text)
            time.sleep(0.2)
    if verdict.verdict == "refused" and not _is_here(knocking.host):
        text = f"{verdict.text}. {knocking.host} is not this machine ({own.host}), where process 0 runs"
        return Verdict(verdict="refused", text=text)
    return verdict


def _too_many(own: Introduction) -> Verdict:
    return Verdict(
        verdict="refused",
        text=f"--process-id {own.process} is too high for --num-processes {own.processes}; processes are "
        f"numbered from 0 to {own.processes - 1}",
    )


def _is_here(host: str) -> bool:
    """Whether a name or address is of this machine, as far as can be told."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False
