"""What a JobSet is made from, and whether a cluster would take it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sealion_jax.errors import UserError

FROM_JOB_SET = ("JOBSET_UID", "JOBSET_RESTART_ATTEMPT", "JOBSET_NAME")
"""Environment variables that every pod has already."""
TAKEN = ("/dev/shm", "/usr/local/nvidia", "/usr/local/gib")
"""Where pods have something mounted already."""

# As Kubernetes' page on object names and IDs has them, and on labels.
_WORD = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAME = rf"(?=.{{1,63}}$){_WORD}"
_DOTTED = rf"(?=.{{1,253}}$){_WORD}(\.{_WORD})*"
_LABEL_VALUE = r"(?=.{0,63}$)([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?"
_LABEL_KEY = rf"({_WORD}(\.{_WORD})*/)?(?=.{{1,63}}$)[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?"
_VARIABLE = r"[-._a-zA-Z][-._a-zA-Z0-9]*"
_BUCKET = r"gs://[a-z0-9][-_.a-z0-9]*(/.*)?"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a JobSet is made from."""

    name: str
    """Of the JobSet: letters, digits and hyphens."""
    image: str
    """Container image with this package (launch/container)."""
    topology: str
    """Chip and shape: v5p:4x4x4, v6e:16x16, tpu7x:4x4x8, h100:4x8 (nodes x GPUs), ..."""
    run_dir: str
    """gs://..., or a path below the mount of a --claims."""
    slices: int = 1
    """TPU slices of that shape, joined by the data centre's network."""
    chips_per_node: int | None = None
    """Of v5e and v6e: 4 for nodes of 4 chips where a slice of 8 could be one node."""
    accelerator: str | None = None
    """Another value of the node label, such as nvidia-h100-mega-80gb for A3 Mega."""
    service_account: str | None = None
    """Kubernetes service account that may read and write the bucket (Workload Identity)."""
    namespace: str | None = None
    queue: str | None = None
    """A LocalQueue of Kueue."""
    spot: bool = False
    node_selector: tuple[str, ...] = ()
    """Further labels of the nodes, key=value: a reservation, a node pool."""
    env: tuple[str, ...] = ()
    """Environment variables, NAME=value."""
    claims: tuple[str, ...] = ()
    """Persistent volume claims to mount, claim=/path."""
    max_restarts: int = 20
    """After failures; preemptions do not count."""
    join_seconds: int = 86400
    """How long a process waits for the others: nodes come, and come back, at different times."""
    grace_seconds: int = 600
    """How long a process may take to save after SIGTERM. Spot machines have less: about 15 seconds."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", self.name):
            raise UserError(f"--name {self.name}: use lower-case letters, digits and hyphens, as in cpt-27b")
        if self.slices < 1 or self.max_restarts < 0 or self.grace_seconds < 1 or self.join_seconds < 1:
            raise UserError(
                "--max-restarts must be at least 0, --slices, --grace-seconds and --join-seconds at least 1"
            )
        if not self.image or re.search(r"\s", self.image):
            raise UserError(f"--image {self.image!r}: give what `podman push` was given (docs/container.md)")
        for option, value, pattern in (
            ("--namespace", self.namespace, _NAME),
            ("--queue", self.queue, _NAME),
            ("--service-account", self.service_account, _DOTTED),
            ("--accelerator", self.accelerator, _LABEL_VALUE),
        ):
            if value is not None and (not value or not re.fullmatch(pattern, value)):
                raise UserError(
                    f"{option} {value!r}: Kubernetes allows no such name; kubectl shows what it has"
                )
        for label in self.node_selector:
            _check_label(label)
        for name in pairs("--env", self.env):
            _check_variable(name)
        self._check_claims()
        self._check_run_dir()

    def _check_claims(self) -> None:
        seen: list[str] = list(TAKEN)
        for claim, path in pairs("--claims", self.claims).items():
            given = f"--claims {claim}={path}"
            if not re.fullmatch(_DOTTED, claim):
                raise UserError(f"{given}: {claim} is no name of a claim; `kubectl get pvc` lists them")
            if not re.fullmatch(r"(/[^/:]+)+/?", path) or ".." in path.split("/"):
                raise UserError(f"{given}: a mount is an absolute path, as in data=/mnt/data")
            if path.rstrip("/") in seen:
                raise UserError(f"{given}: something else is mounted there; choose another path")
            seen.append(path.rstrip("/"))

    def _check_run_dir(self) -> None:
        if self.run_dir.startswith("gs:"):
            if not re.fullmatch(_BUCKET, self.run_dir):
                raise UserError(f"--run-dir {self.run_dir}: expected gs://BUCKET/FOLDER")
            return
        mounts = [path.rstrip("/") for path in pairs("--claims", self.claims).values()]
        where = posixpath.normpath(self.run_dir)
        if not any(where.startswith(f"{mount}/") for mount in mounts):
            raise UserError(
                f"--run-dir {self.run_dir} would be lost with its pod: give gs://..., or mount a claim that "
                "all pods see with --claims NAME=/path and choose a directory below that path"
            )


def _check_label(label: str) -> None:
    ((key, value),) = pairs("--node-selector", [label]).items()
    if not (re.fullmatch(_LABEL_KEY, key) and re.fullmatch(_LABEL_VALUE, value)):
        raise UserError(
            f"--node-selector {label}: nodes have no such label; `kubectl describe node` lists them"
        )


def _check_variable(name: str) -> None:
    if not re.fullmatch(_VARIABLE, name):
        raise UserError(f"--env {name}=...: a variable's name has letters, digits and _, as in MY_FLAG=1")
    if name in FROM_JOB_SET:
        raise UserError(f"--env {name}=...: is set from the JobSet, to tell its starts apart; leave it out")


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """`key=value` words as a mapping.

    Raises:
        UserError: a word has no key or no `=`, or two have the same key.
    """
    found: dict[str, str] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise UserError(f"{option} {word}: expected key=value")
        if key in found:
            raise UserError(f"{option}: {key} is given twice, as {found[key]} and as {value}; give it once")
        found[key] = value
    return found
