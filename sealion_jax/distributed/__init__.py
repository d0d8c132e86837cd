"""Joining the processes of a run."""

from sealion_jax.distributed.cluster import Cluster
from sealion_jax.distributed.config import CLUSTERS, DistributedConfig
from sealion_jax.distributed.devices import Devices
from sealion_jax.distributed.finding import find_cluster
from sealion_jax.distributed.joining import Joined, join

__all__ = ["CLUSTERS", "Cluster", "Devices", "DistributedConfig", "Joined", "find_cluster", "join"]
