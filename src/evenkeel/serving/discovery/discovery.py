"""Defines what says where the nodes of a fleet are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

__all__ = ["MAX_NODES", "Discovery", "OnFound"]

MAX_NODES = 1024  # of one discovery; where there are more, something is wrong
OnFound = Callable[[Collection[str]], object]


class Discovery(ABC):
    """Says where nodes are, as addresses that a configuration could list.

    Where it cannot find out, nothing has changed: it says so in the log, and tries again. What it reads is checked and
    bounded.
    """

    @abstractmethod
    async def watch(self, found: OnFound) -> None:
        """Calls `found` with all addresses when they are known, and whenever they have changed; until cancelled."""
