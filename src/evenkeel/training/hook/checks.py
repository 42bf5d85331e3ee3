"""Checks what a training gives to the hook's states: arguments of a wrong kind, saved states that belong to another."""

import warnings
from collections.abc import Mapping

from torch import Tensor

from evenkeel.errors import ConfigurationError

__all__ = [
    "check_kind",
    "check_loss_scale",
    "check_pickles",
    "check_saved_state",
    "count_tensors",
    "warn_of_lost_tensors",
]

# The fields that `state_dict` of each state holds, by which it is recognised.
_HOLDS = {
    "HookState": {"step", "rank", "world", "sizes", "units", "code"},
    "PipeSGD": {"step", "flights", "look_ahead", "state"},
    "LookAhead": {"own", "scale"},
}
# What older files do not have.
_SINCE = {"tensors", "unwaited"}


def check_kind(name: str, value: object, fits: bool, wanted: str) -> None:
    """Raises a ConfigurationError naming `name` and what is `wanted`, unless `value` fits or is None."""
    if value is not None and not fits:
        raise ConfigurationError(f"{name} must be {wanted}, or None, found {value!r}")


def check_loss_scale(loss_scale: object) -> None:
    """Raises a ConfigurationError unless it is a function or None."""
    wanted = "a function that gives the loss scale of the step under way, such as scaler.get_scale without brackets"
    check_kind("loss_scale", loss_scale, callable(loss_scale), wanted)


def check_pickles(**functions: object) -> None:
    """Raises a ConfigurationError naming the first of `functions` that pickle cannot find again: of no module."""
    for name, function in functions.items():
        if "<" in getattr(function, "__qualname__", ""):
            raise ConfigurationError(
                f"{name}={function!r} cannot be pickled, as it is a function within a function: define it in a module, "
                "or save state_dict() instead of the state itself"
            )


def check_saved_state(state: object, owner: str) -> None:
    """Raises a ConfigurationError unless `state` is what `state_dict` of `owner` gives."""
    found = set(state) - _SINCE if isinstance(state, Mapping) else None
    if found == _HOLDS[owner]:
        return
    theirs = next((name for name, holds in _HOLDS.items() if holds == found), None)
    if theirs is not None:
        raise ConfigurationError(
            f"this is the state of a {theirs}, not of a {owner}: load it with {theirs}.load_state_dict"
        )
    what = f"{type(state).__name__}" if found is None else f"a dictionary of {sorted(map(str, found)) or 'nothing'}"
    raise ConfigurationError(
        f"this is no state of a {owner} but {what}: load what {owner}.state_dict gave on this rank, and nothing else"
    )


def count_tensors(state: object) -> int:
    """Counts the tensors in dictionaries, lists and tuples of any depth."""
    if isinstance(state, Mapping):
        return sum(map(count_tensors, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(count_tensors, state))
    return int(isinstance(state, Tensor))


def warn_of_lost_tensors(saved: int, found: int, starts_anew: str) -> bool:
    """Says whether a state that was loaded lacks tensors that it was saved with; warns of what `starts_anew` then."""
    if found >= saved:
        return False
    warnings.warn(
        f"the state that was loaded lacks {saved - found} of its {saved} tensors, so {starts_anew}: "
        "torch.distributed.checkpoint loads only what a new state has already; save state_dict() with torch.save, in a "
        "file for each rank, or as bytes (docs/how-to/frameworks.md)",
        stacklevel=3,
    )
    return True
