"""Gives each host's process its environment: the variables of torchrun, and a share of the processors."""

from collections.abc import Mapping, Sequence

from evenkeel.errors import ConfigurationError
from evenkeel.lab.topology import INTERFACE, Topology

__all__ = ["MASTER_PORT", "deal_cpus", "environment", "read_cpus"]

MASTER_PORT = 29500  # every lab has a network of its own, so it is always free


def environment(
    topology: Topology, rank: int, inherited: Mapping[str, str], threads: int, port: int = MASTER_PORT
) -> dict[str, str]:
    """Gives the environment of one host's process.

    Args:
        topology: the emulated network.
        rank: of the host; it has one process, so its local rank is 0.
        inherited: the caller's own variables, which stay unless they are named here.
        threads: how many to compute with, unless the caller's variables say so.
        port: where rank 0 waits for the others.
    """
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(topology.hosts),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "MASTER_ADDR": topology.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
    }
    return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **inherited, **own}


def read_cpus(text: str, allowed: Sequence[int]) -> list[int]:
    """Reads processor numbers from `0-3,6`.

    Raises:
        ConfigurationError: not of that form, or a processor that this process may not use.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigurationError(f"cpus must be processor numbers such as 0-3,6; found {text!r}")
        found += range(int(first), int(last or first) + 1)
    wrong = sorted(set(found) - set(allowed))
    if wrong or not found:
        raise ConfigurationError(f"cpus: {wrong or text} cannot be used here; there are {sorted(allowed)}")
    return sorted(set(found))


def deal_cpus(cpus: Sequence[int], hosts: int) -> list[list[int]]:
    """Deals out the processors to hosts one after another; they are shared where there are fewer than hosts."""
    if len(cpus) < hosts:
        return [[cpus[rank % len(cpus)]] for rank in range(hosts)]
    return [list(cpus[rank::hosts]) for rank in range(hosts)]
