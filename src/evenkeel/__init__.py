"""evenkeel keeps distributed machine learning on an even keel."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evenkeel.errors import MissingExtraError
from evenkeel.version import __version__ as __version__

if TYPE_CHECKING:
    from evenkeel.coding.sums.error_feedback import ErrorFeedback
    from evenkeel.coding.sums.fixed_point import FixedPoint
    from evenkeel.coding.sums.gradiveq import GradiVeQ
    from evenkeel.coding.sums.low_rank import LowRank
    from evenkeel.coding.sums.thc import THC
    from evenkeel.reducers.process_group import ProcessGroup
    from evenkeel.reducers.sharded import Sharded
    from evenkeel.training.hook.ddp_hook import comm_hook
    from evenkeel.training.hook.hook_state import HookState
    from evenkeel.training.hook.pipe_sgd import PipeSGD
    from evenkeel.training.hook.skipping import named

__all__ = [
    "THC",
    "ErrorFeedback",
    "FixedPoint",
    "GradiVeQ",
    "HookState",
    "LowRank",
    "PipeSGD",
    "ProcessGroup",
    "Sharded",
    "comm_hook",
    "named",
]


# Loaded on first use: they bring torch, which serving does without.
_HOMES = {
    "ErrorFeedback": "evenkeel.coding.sums.error_feedback",
    "FixedPoint": "evenkeel.coding.sums.fixed_point",
    "GradiVeQ": "evenkeel.coding.sums.gradiveq",
    "HookState": "evenkeel.training.hook.hook_state",
    "LowRank": "evenkeel.coding.sums.low_rank",
    "PipeSGD": "evenkeel.training.hook.pipe_sgd",
    "ProcessGroup": "evenkeel.reducers.process_group",
    "Sharded": "evenkeel.reducers.sharded",
    "THC": "evenkeel.coding.sums.thc",
    "comm_hook": "evenkeel.training.hook.ddp_hook",
    "named": "evenkeel.training.hook.skipping",
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


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
