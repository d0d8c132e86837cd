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
import sys
from collections.abc import Sequence
from typing import Any

import yaml  # comes with flax
from job_options import Options, pairs
from node_pools import ADAPTERS, NodePool, node_pool
from restarts import job_rules, pod_rules, told_apart

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.planning.topology import Topology, check_slices, parse_topology

COORDINATOR_PORT = 8476
RDMA_LIBRARIES = "/usr/local/gib/lib64:/usr/local/nvidia/lib64"


def main(argv: Sequence[str]) -> None:
    """Prints the manifest."""
    split = argv.index("--") if "--" in argv else len(argv)
    options = cli.parse(Options, argv[:split], prog="render.py", description=(__doc__ or "").split("\n")[0])
    command = list(argv[split + 1 :])
    topology = _topology(options)
    pool = node_pool(topology, chips_per_node=options.chips_per_node, accelerator=options.accelerator)
    check_command(command, topology)
    print(yaml.safe_dump(job_set(options, pool, command), sort_keys=False, width=110), end="")


def _topology(options: Options) -> Topology:
    topology = parse_topology(options.topology)
    if topology.is_tpu:
        return parse_topology(options.topology, num_slices=options.slices)
    if options.slices > 1:
        raise UserError(
            f"--slices {options.slices} is for TPUs; the nodes of GPUs are in the topology, as in h100:4x8"
        )
    return topology


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
    if recipe is not None and recipe.endswith(".py"):
        if not os.path.exists(recipe):
            print(f"{recipe} is not here, and was not checked", file=sys.stderr)
            return
        if not os.path.isabs(recipe):
            print(
                f"{recipe} was checked as it is here; pods read the image's, below its working directory "
                "(/opt/sealion_jax in that of launch/container)",
                file=sys.stderr,
            )
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
    selector = dict(pool.selector)
    tolerations = [{"key": pool.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        tolerations.append({**spot, "effect": "NoSchedule"})
    for key, value in pairs("--node-selector", options.node_selector).items():
        if key in selector:
            raise UserError(
                f"--node-selector {key}: is set from --topology, --accelerator and --spot; leave it out"
            )
        selector[key] = value
    volumes: list[dict[str, Any]] = []
    mounts = []
    for n, (claim, path) in enumerate(pairs("--claims", options.claims).items()):
        # A claim's name may have dots, or be one of the names below.
        volumes.append({"name": f"claim-{n}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{n}", "mountPath": path})
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
    # Google's settings for NCCL over RDMA are a script on the node.
    return told_apart(train, sourced="/usr/local/gib/scripts/set_nccl_env.sh" if pool.rdma else None)


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


if __name__ == "__main__":
    cli.run(main)
