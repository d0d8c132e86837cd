#!/usr/bin/env python
"""Prints a JobSet for GKE that trains on TPU slices or GPU nodes, and starts again after preemptions.

    python launch/gke/render.py --name run1 --image IMAGE --topology v5p:4x4x4 --run-dir gs://bucket/run1 \\
        -- cpt_27b > job.yaml
    kubectl apply -f job.yaml

After `--` is what `python -m sealion_jax.train` takes. Topologies are named as for `sealion_jax.plan`. The
page is docs/gke.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml  # comes with flax
from node_pools import NodePool, node_pool
from restarts import job_rules, pod_rules

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.planning.topology import Topology, check_slices, parse_topology

COORDINATOR_PORT = 8476
RDMA_LIBRARIES = "/usr/local/gib/lib64:/usr/local/nvidia/lib64"
ADAPTERS = 8
"""RDMA adapters of an A3 Ultra or A4 node; a pod takes all of them."""


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
        if self.max_restarts < 0 or self.grace_seconds < 1 or self.join_seconds < 1:
            raise UserError(
                "--max-restarts must be at least 0, --grace-seconds and --join-seconds at least 1"
            )
        mounts = [mount.rstrip("/") for mount in pairs("--claims", self.claims).values()]
        if not self.run_dir.startswith("gs://") and not any(
            self.run_dir.startswith(f"{mount}/") for mount in mounts
        ):
            raise UserError(
                f"--run-dir {self.run_dir} would be lost with its pod: give gs://..., or mount a claim that "
                "all pods see with --claims NAME=/path and choose a directory below that path"
            )
        if not all(mount.startswith("/") for mount in mounts):
            raise UserError("--claims: a mount is an absolute path, as in data=/mnt/data")


def main(argv: Sequence[str]) -> None:
    """Prints the manifest."""
    split = argv.index("--") if "--" in argv else len(argv)
    options = cli.parse(Options, argv[:split], prog="render.py", description=(__doc__ or "").split("\n")[0])
    command = list(argv[split + 1 :])
    topology = parse_topology(options.topology, num_slices=options.slices)
    pool = node_pool(topology, chips_per_node=options.chips_per_node, accelerator=options.accelerator)
    check_command(command, topology)
    print(yaml.safe_dump(job_set(options, pool, command), sort_keys=False, width=110), end="")


def check_command(command: Sequence[str], topology: Topology) -> None:
    """Raises UserError where training would refuse its command, so that no pod is started for it.

    A recipe that is a file of the image cannot be read here, and is not checked.
    """
    from sealion_jax.planning.analytical import abstract_mesh
    from sealion_jax.recipe import load_and_override
    from sealion_jax.run.update import on_mesh
    from sealion_jax.sharding import mesh_shape
    from sealion_jax.train import OPTIONS

    ours = {"--run-dir", *(f"--{name}" for name in OPTIONS if name != "profile")}
    given = next((word for word in command if word.partition("=")[0] in ours), None)
    if given is not None:
        raise UserError(
            f"{given} after -- is set by render.py; its own options, such as --run-dir and --join-seconds, "
            "stand before the --"
        )
    named = bool(command) and not command[0].startswith("-")
    recipe = command[0] if named else None
    if recipe is not None and recipe.endswith(".py") and not os.path.exists(recipe):
        print(f"{recipe} is not here, and was not checked", file=sys.stderr)
        return
    overrides = [word for word in command[named:] if word != "--profile"]
    config = load_and_override(recipe, overrides)
    check_slices(config.mesh, topology)
    shape = mesh_shape(config.mesh, topology.num_devices)
    mesh: Any = abstract_mesh(shape)
    on_mesh(config, mesh)


def job_set(options: Options, pool: NodePool, command: Sequence[str]) -> dict[str, Any]:
    """The manifest: one Job a slice (or for all GPU nodes), one pod a node, one process a pod."""
    longest = f"{options.name}-train-{pool.slices - 1}-{pool.nodes - 1}"
    if len(longest) > 57:  # a host name has 63 characters, and six are added to pods' names
        raise UserError(f"--name {options.name} is too long by {len(longest) - 57} characters")
    metadata: dict[str, Any] = {"name": options.name}
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if pool.resource == "google.com/tpu" and pool.nodes > 1:
        # A slice is a node pool, and its chips are of use to one Job alone.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    job = {
        "parallelism": pool.nodes,
        "completions": pool.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod that fails fails its Job, and the JobSet's rules decide
        "podFailurePolicy": {"rules": pod_rules()},
        "template": _pod_template(options, pool, command),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # Pods' names are in DNS before they are ready: all look for the first one while they start.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.max_restarts, "rules": job_rules()},
            "replicatedJobs": [{"name": "train", "replicas": pool.slices, "template": {"spec": job}}],
        },
    }


def _pod_template(options: Options, pool: NodePool, command: Sequence[str]) -> dict[str, Any]:
    selector = {**pool.selector, **pairs("--node-selector", options.node_selector)}
    tolerations = [{"key": pool.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        tolerations.append({**spot, "effect": "NoSchedule"})
    claims = pairs("--claims", options.claims)
    volumes: list[dict[str, Any]] = [
        {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims
    ]
    mounts = [{"name": claim, "mountPath": path} for claim, path in claims.items()]
    # A pod has 64 MB by itself; NCCL and loaders in processes of their own need more.
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    # Where no accelerator is found JAX would train on the CPU, unless it is told what has to be there.
    env = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "tpu,cpu"}
    if pool.resource == "nvidia.com/gpu":
        libraries = "/usr/local/nvidia/lib64" if not pool.rdma else RDMA_LIBRARIES
        env |= {"JAX_PLATFORMS": "cuda,cpu", "LD_LIBRARY_PATH": libraries}
        # Warnings of NCCL tell which peer failed. JAX may have more than its 75% of a GPU that is ours alone.
        env |= {"NCCL_DEBUG": "WARN", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    if pool.rdma:
        for name, path in (("nvidia", "/usr/local/nvidia"), ("gib", "/usr/local/gib")):
            volumes.append({"name": name, "hostPath": {"path": f"/home/kubernetes/bin/{name}"}})
            mounts.append({"name": name, "mountPath": path})
    env |= pairs("--env", options.env)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        # Python is not the first process then, which a signal without a handler does not end.
        "shareProcessNamespace": True,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [
            {
                "name": "train",
                "image": options.image,
                # Kubernetes makes $ of $$, and would put variables in the place of $(NAME).
                "command": [word.replace("$", "$$") for word in _command(options, pool, command)]
                + _cluster(options, pool),
                "env": [{"name": name, "value": value} for name, value in env.items()]
                + _from_job_set(options.name),
                "resources": {"limits": {pool.resource: str(pool.chips_per_node)}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if pool.slices > 1:
        # Slices talk over the node's own network: a pod's is slower.
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    template: dict[str, Any] = {"spec": pod}
    if pool.rdma:
        template["metadata"] = {"annotations": _rdma_annotations()}
    return template


def _command(options: Options, pool: NodePool, command: Sequence[str]) -> list[str]:
    train = ["python", "-m", "sealion_jax.train", *command, "--run-dir", options.run_dir]
    if not pool.rdma:
        return train
    # Google's settings for NCCL over these adapters are a script on the node.
    return ["bash", "-c", 'source /usr/local/gib/scripts/set_nccl_env.sh && exec "$@"', "bash", *train]


def _cluster(options: Options, pool: NodePool) -> list[str]:
    """How processes find each other: on TPUs by what GKE tells its pods, on GPUs by these options."""
    words = ["--join-timeout-seconds", str(options.join_seconds)]
    words += ["--expect-local-devices", str(pool.devices_per_node)]
    if pool.resource == "google.com/tpu":
        return ["--cluster", "gke", *words]
    if pool.nodes == 1:
        return ["--cluster", "none", *words]
    first = f"{options.name}-train-0-0.{options.name}"
    return [
        *("--coordinator-address", f"{first}:{COORDINATOR_PORT}"),
        *("--num-processes", str(pool.nodes)),
        *("--process-id", "$(JOB_COMPLETION_INDEX)"),
        *words,
    ]


def _from_job_set(name: str) -> list[dict[str, Any]]:
    """Variables by which training knows the JobSet, and how often it was started again.

    The JobSet's uid is in its name: one that is deleted and made anew counts its starts from 0 again, and
    would be taken for an earlier start of the same JobSet.
    """

    def annotation(variable: str, key: str) -> dict[str, Any]:
        path = f"metadata.annotations['jobset.sigs.k8s.io/{key}']"
        return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    return [
        annotation("JOBSET_UID", "jobset-uid"),
        annotation("JOBSET_RESTART_ATTEMPT", "restart-attempt"),
        {"name": "JOBSET_NAME", "value": f"{name}/$(JOBSET_UID)"},
    ]


def _rdma_annotations() -> dict[str, str]:
    """The networks of A3 Ultra and A4, under the names that Google's pages on GKE give them."""
    networks = ["default", "gvnic-1", *(f"rdma-{n}" for n in range(ADAPTERS))]
    interfaces = [{"interfaceName": f"eth{n}", "network": network} for n, network in enumerate(networks)]
    return {
        "networking.gke.io/default-interface": "eth0",
        "networking.gke.io/interfaces": json.dumps(interfaces),
    }


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """`key=value` words as a mapping.

    Raises:
        UserError: a word has no key or no `=`.
    """
    found = [word.partition("=") for word in given]
    wrong = next(
        (word for word, (key, equals, _) in zip(given, found, strict=True) if not (key and equals)), None
    )
    if wrong is not None:
        raise UserError(f"{option} {wrong}: expected key=value")
    return {key: value for key, _, value in found}


if __name__ == "__main__":
    cli.run(main)
