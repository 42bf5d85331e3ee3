"""Says how much memory is free, so that images which do not fit are refused before they are read."""

from contextlib import suppress
from pathlib import Path

from evenkeel.errors import ConfigurationError

__all__ = ["check_memory", "free_bytes"]

_MEMINFO = Path("/proc/meminfo")
# What a container may use, and uses; of two generations of control groups.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
_KEPT_FREE = 0.1  # of what is free, for everything else


def free_bytes() -> int | None:
    """Gives the memory that this process may still take, in bytes; None where the system does not say."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for limit, usage, stat in _LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            left = int(Path(limit).read_text()) - int(Path(usage).read_text())
            # Files' pages are given up when memory is short.
            pages = dict(line.split() for line in Path(stat).read_text().splitlines())
            found.append(left + int(pages.get("inactive_file", 0)) + int(pages.get("active_file", 0)))
    return min(found, default=None)


def check_memory(needed: int, what: str) -> None:
    """Refuses what would take more memory than is free: the system would end this process without a word.

    Raises:
        ConfigurationError: `what` needs more.
    """
    free = free_bytes()
    if free is not None and needed > (1 - _KEPT_FREE) * free:
        raise ConfigurationError(
            f"{what} need {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free; read fewer with a limit"
        )
