"""Whose state it is that a training resumes from, told by what it holds."""

from collections.abc import Mapping

from evenkeel.errors import ConfigurationError

__all__ = ["check_saved_state"]

_HOLDS = {
    "HookState": {"step", "rank", "world", "sizes", "units", "code"},
    "PipeSGD": {"step", "flights", "look_ahead", "state"},
    "LookAhead": {"own", "scale"},
}


def check_saved_state(state: object, owner: str) -> None:
    """ConfigurationError unless `state` is what `state_dict` of `owner` gives."""
    found = set(state) if isinstance(state, Mapping) else None
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
