"""A Ray cluster on this machine, for tests of what runs there."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

STORE = 80 << 20  # bytes of a node's object store


@contextlib.contextmanager
def ray_cluster(nodes: int = 2, cpus: int = 2) -> Iterator[Any]:
    """A cluster of so many nodes, as `ray.cluster_utils.Cluster`."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the actors' processes
        head = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes - 1):
                add_node(cluster, cpus)
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Any, cpus: int = 2) -> Any:
    """One more node. In the main thread only: Ray handles signals there."""
    return cluster.add_node(num_cpus=cpus, object_store_memory=STORE)


def alive(pid: int) -> bool:
    """True while a process of that id runs."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
