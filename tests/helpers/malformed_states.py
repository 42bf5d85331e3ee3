"""Spoils saved states: every field of other types, left out, cut short, or not a number."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def malformed(state: Any, may_be_nan: frozenset[str] = frozenset({"moments"}), field: str = "") -> Iterator[Any]:
    """Copies of `state` with one fault each."""
    yield from (object(), 1j)
    if isinstance(state, dict):
        for name, value in state.items():
            inner = str(name) if not str(name).isdecimal() else field
            for wrong in malformed(value, may_be_nan, inner):
                yield state | {name: wrong}
            if not str(name).isdecimal() and name not in ("tensors", "unwaited"):
                yield {other: each for other, each in state.items() if other != name}
        if any(not str(name).isdecimal() for name in state):
            yield state | {"nonsense": 1}
    elif isinstance(state, list | tuple):
        kind = type(state)
        for place, value in enumerate(state):
            for wrong in malformed(value, may_be_nan, field):
                yield kind([*state[:place], wrong, *state[place + 1 :]])
        if state and field not in ("shapes", "sizes"):  # which the first step compares with the model
            yield kind(state[:-1])
    elif isinstance(state, Tensor):
        yield state.to(torch.int64)
        yield state[None]
        if field not in may_be_nan:
            yield torch.full_like(state, torch.nan)
        if field in ("bases", "moments", "average"):
            yield state[:, :-1] if state.dim() > 1 else state[:-1]
    elif isinstance(state, int) and not isinstance(state, bool):
        yield from (-1, 0.5, None)
