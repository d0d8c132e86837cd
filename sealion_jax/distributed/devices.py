"""What devices the processes of a run see, once JAX's service joins them; told by name where it is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import jax

from sealion_jax.config_tree import from_plain
from sealion_jax.distributed.cluster import Cluster
from sealion_jax.errors import UserError
from sealion_jax.key_value_store import KeyValueStore, key_value_store

_FOLDER = "sealion_jax/devices"
_TROUBLE = "sealion_jax/trouble"
_LOOK_SECONDS = 1.0
DEVICES_SECONDS = 600.0
"""All are there by then: who needs longer to wake its devices hangs, however long they were waited for."""
_DEVICES_OF_A_CHIP = {"TPU7x": 2}
"""Of the kinds of which schedulers count chips, and JAX more devices than those."""
_MOST_LINES = 8


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What one process sees."""

    process: int
    host: str
    count: int
    kind: str
    """As JAX calls it: "NVIDIA H200", "TPU v5", "cpu"."""
    platform: str
    expected: int | None = None
    expected_platform: str | None = None
    expected_by: str = ""

    def describe(self) -> str:
        """ "8 gpu devices (NVIDIA H200)"."""
        kind = "" if self.kind.lower() == self.platform else f" ({self.kind})"
        return f"{self.count} {self.platform} device{'s' if self.count != 1 else ''}{kind}"


def see_devices(cluster: Cluster, *, host: str, expected: int | None) -> Devices:
    """What this process sees; wakes its devices, and with several processes waits for theirs.

    Args:
        expected: so many were demanded by the user; None: what the scheduler says counts.
    """
    local = jax.local_devices()
    given = cluster.expected_devices
    if given is not None and cluster.expected_platform == "tpu":
        given *= _DEVICES_OF_A_CHIP.get(local[0].device_kind, 1)
    return Devices(
        process=cluster.process_id,
        host=host,
        count=len(local),
        kind=local[0].device_kind,
        platform=local[0].platform,
        expected=given if expected is None else expected,
        expected_platform=cluster.expected_platform if expected is None else None,
        expected_by=cluster.expected_by if expected is None else "--expect-local-devices",
    )


def no_device(error: Exception) -> str:
    """What is told of a process whose devices JAX could not wake."""
    said = " ".join(str(error).split()) or "JAX was asked for a kind of device that is not installed"
    return f"found no device that it can use: {type(error).__name__}: {said}"


def exchange_devices(
    see: Callable[[], Devices],
    cluster: Cluster,
    *,
    host: str,
    limit_seconds: float,
    blame: Callable[[Sequence[str]], None],
) -> list[Devices]:
    """What every process sees, in their order, on all of them.

    If one cannot wake its devices, or takes longer than the limit, every process ends here, with exit code 2
    and a line that says so: those that wait are deep within JAX, where no exception reaches them.

    Args:
        blame: is given the host of such a process before, on process 0.
    """
    store = key_value_store()
    own = cluster.process_id
    with limited(limit_seconds, store, own, blame=blame) as done:
        try:
            devices = see()
        except Exception as error:
            done.set()
            text = f"process {own} {no_device(error)}"
            store.key_value_set(_TROUBLE, json.dumps([text, host]), allow_overwrite=True)
            if own == 0:
                blame([host])
            _end(text, own)
            raise
        store.key_value_set(f"{_FOLDER}/{own}", json.dumps(asdict(devices)))
        store.wait_at_barrier(_FOLDER, int(limit_seconds * 1000) + 60_000)
        known = [from_plain(json.loads(text), Devices) for _, text in store.key_value_dir_get(_FOLDER)]
    return sorted(known, key=lambda one: one.process)


def check_devices(seen: Sequence[Devices]) -> None:
    """Refuses devices that are fewer than the scheduler gave, or not the same for all.

    Raises:
        UserError: names every process, the same on all.
    """
    lines = [line for _, line in _odd(seen)]
    if lines:
        more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        raise UserError("\n".join([*lines[:_MOST_LINES], *more, _remedy(seen)]))


def describe_devices(seen: Sequence[Devices]) -> str:
    """ "4 processes on 2 nodes, 8 gpu devices (NVIDIA H200) each"."""
    nodes = len({one.host for one in seen})
    each = " each" if len(seen) > 1 else ""
    return (
        f"{len(seen)} process{'es' if len(seen) > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}, "
        f"{seen[0].describe()}{each}"
    )


def odd_hosts(seen: Sequence[Devices]) -> list[str]:
    """The machines that `check_devices` refuses."""
    return list(dict.fromkeys(one.host for one, _ in _odd(seen)))


def _odd(seen: Sequence[Devices]) -> list[tuple[Devices, str]]:
    """What is refused, and the line that says why."""
    too_few = [(one, _too_few(one)) for one in seen if _is_too_few(one)]
    groups: dict[str, list[Devices]] = {}
    for one in seen:
        groups.setdefault(one.describe(), []).append(one)
    if too_few or len(groups) <= 1:
        return too_few
    usual, *rest = sorted(groups, key=lambda name: -len(groups[name]))
    return [
        (one, f"process {one.process} on {one.host} sees {name}, the others {usual}")
        for name in rest
        for one in groups[name]
    ]


def _is_too_few(one: Devices) -> bool:
    if one.expected is None:
        return False
    return one.count < one.expected or one.expected_platform not in (None, one.platform)


def _too_few(one: Devices) -> str:
    given = f"{one.expected} {one.expected_platform or ''}".strip()
    return f"process {one.process} on {one.host} sees {one.describe()}; expected {given} by {one.expected_by}"


def _remedy(seen: Sequence[Devices]) -> str:
    if any(one.expected_platform == "gpu" and one.platform == "cpu" for one in seen):
        return "install the extra cuda there (pip install 'sealion_jax[cuda]'), and see what nvidia-smi says"
    if any(one.expected_platform == "tpu" and one.platform == "cpu" for one in seen):
        return "install the extra tpu there (pip install 'sealion_jax[tpu]')"
    return (
        "look there for a device that failed (nvidia-smi -L), for CUDA_VISIBLE_DEVICES, and for what was "
        "asked of the scheduler; a node that is broken is left out with its --exclude"
    )


@contextlib.contextmanager
def limited(
    limit_seconds: float,
    store: KeyValueStore | None = None,
    own: int = 0,
    *,
    blame: Callable[[Sequence[str]], None] = lambda _: None,
) -> Iterator[threading.Event]:
    """Ends the process when the time is up, or another is in trouble, unless block or event came before.

    Args:
        store: of a run of several processes, which wait for each other.
    """
    done = threading.Event()
    deadline = time.monotonic() + limit_seconds

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            if store is not None:
                with contextlib.suppress(Exception):  # nothing was told, or the service has no time
                    text, host = json.loads(store.key_value_try_get(_TROUBLE))
                    if own == 0:
                        blame([host])
                    _end(text, own)
            if time.monotonic() > deadline:
                whose = "its devices: the driver hangs"
                if store is not None:
                    whose = (
                        "the devices of all processes: one of them hangs in its driver, or was killed. Look "
                        "which log ends otherwise"
                    )
                _end(f"process {own} waited {limit_seconds:.0f} s for {whose}", own)

    thread = threading.Thread(target=watch, name="devices", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        done.set()


def _end(text: str, own: int) -> None:
    """Ends the process with exit code 2; process 0 last, since JAX ends the others when its service goes."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    if own == 0:
        time.sleep(3 * _LOOK_SECONDS)
    os._exit(2)
