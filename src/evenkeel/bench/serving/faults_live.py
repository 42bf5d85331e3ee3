"""Makes faults in the workers of a running gateway, at the times that a scenario says."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from evenkeel.delays.faults import CpuHog, Fault, freeze, kill, thaw
from evenkeel.errors import EvenkeelError

__all__ = ["make_faults", "worker_pids"]


def worker_pids(gateway_pid: int) -> dict[int, int]:
    """Gives number -> process id of the workers that a gateway started (Linux: read from /proc)."""
    try:
        children = Path(f"/proc/{gateway_pid}/task/{gateway_pid}/children").read_text().split()
    except OSError as error:
        raise EvenkeelError(f"the workers of process {gateway_pid} cannot be listed: {error}") from error
    pids = {}
    for pid in children:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended in the meantime
        for word in words:
            if word.startswith("--worker-number="):
                pids[int(word.partition("=")[2])] = int(pid)
    return pids


async def make_faults(faults: Sequence[Fault], gateway_pid: int, replicas: int) -> None:
    """Makes each fault happen at its time from now; what was frozen is thawed, also when this is cancelled."""
    async with asyncio.TaskGroup() as group:
        for fault in faults:
            group.create_task(_make(fault, gateway_pid, replicas))


async def _make(fault: Fault, gateway_pid: int, replicas: int) -> None:
    await asyncio.sleep(fault.at_s)
    if fault.target == "machine":
        with CpuHog(fault.number, fault.for_s):
            await asyncio.sleep(fault.for_s)
        return
    number = fault.number + (replicas if fault.target == "backup" else 0)
    pid = worker_pids(gateway_pid).get(number)
    if pid is None:
        raise EvenkeelError(f"{fault.describe()}: there is no such worker")
    if fault.kind == "kill":
        kill(pid)
        return
    freeze(pid)
    try:
        await asyncio.sleep(fault.for_s)
    finally:
        thaw(pid)
