"""Offers the fakes and the virtual clock that evenkeel's own tests use, for tests of what is built on it.

    from evenkeel.testing import FakeBackend, VirtualClock

What needs torch (`FakeReducer`, `thread_collectives`) is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evenkeel.backends.delayed import Delayed
from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import VirtualClock
from evenkeel.errors import MissingExtraError
from evenkeel.serving.simulate import Fleet, arrivals, simulate

if TYPE_CHECKING:
    from evenkeel.reducers.fake import FakeReducer
    from evenkeel.reducers.ranks.thread_collectives import thread_collectives

__all__ = [
    "Delayed",
    "FakeBackend",
    "FakeReducer",
    "Fleet",
    "VirtualClock",
    "arrivals",
    "simulate",
    "thread_collectives",
]

_HOMES = {
    "FakeReducer": "evenkeel.reducers.fake",
    "thread_collectives": "evenkeel.reducers.ranks.thread_collectives",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("PyTorch", "train") from error
