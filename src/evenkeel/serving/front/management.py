"""Defines what front ends offer to those who run the server: its models, loaded or not, and their nodes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from evenkeel.serving.gateway.gateway import NodeKind

__all__ = ["Management", "ModelState", "NodeState", "ReloadReport"]


@dataclass(frozen=True)
class ModelState:
    """Says how a model of the configuration is; `reason` where it is not ready."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = ""


@dataclass(frozen=True)
class NodeState:
    """Says how a node of a model's fleet is."""

    name: str
    kind: NodeKind
    own: bool  # a worker that the server started
    ready: bool
    tasks: int


@dataclass(frozen=True)
class ReloadReport:
    """Says what a reload did.

    Attributes:
        loaded: names of the models.
        need_restart: fields that have changed too, and take effect only when the server is restarted.
    """

    loaded: list[str]
    need_restart: list[str]


class Management(ABC):
    """Changes what a server serves, while it serves. A change that fails leaves everything as it was.

    Every method but `index` and `nodes` may raise ConfigurationError (what is asked for does not fit), BackendError (a
    worker could not be started), UnknownModelError, and OverloadedError while another change is under way.
    """

    @abstractmethod
    def index(self) -> list[ModelState]:
        """Gives the models of the configuration."""

    @abstractmethod
    def nodes(self) -> dict[str, list[NodeState]]:
        """Gives the nodes of every model that is loaded."""

    @abstractmethod
    async def load(self, name: str) -> None:
        """Loads a model, or the present version of one that is loaded, which goes on until the new one answers."""

    @abstractmethod
    async def unload(self, name: str) -> None:
        """Serves a model no longer; what it was asked before is still answered."""

    @abstractmethod
    async def reload(self) -> ReloadReport:
        """Reads the configuration again, and loads every model that it changed."""

    @abstractmethod
    async def restart(self, at_once: int) -> None:
        """Replaces all workers of this server, so many at a time."""

    @abstractmethod
    async def resize(self, name: str, kind: NodeKind, count: int) -> None:
        """Starts or ends workers of a model until there are so many of a kind."""
