"""Checks the fields of saved states, before anything of them is loaded."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import CodeError

__all__ = ["saved_fields", "saved_list", "saved_numbers", "saved_shapes", "saved_tensor", "saved_whole"]


def saved_fields(name: str, value: object, holds: Iterable[str]) -> Mapping[str, Any]:
    """Gives a dictionary that has just the fields that it should; otherwise raises CodeError."""
    wanted = set(holds)
    if isinstance(value, Mapping) and set(value) == wanted:
        return value
    found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
    raise CodeError(f"{name}: the state must hold {sorted(wanted)}, found {found}")


def saved_numbers(name: str, value: object) -> dict[int, Any]:
    """Gives a dictionary by whole numbers; some checkpoints make texts of them. Otherwise raises CodeError."""
    if not isinstance(value, Mapping):
        raise CodeError(f"{name}: the state must be a dictionary by number, found {type(value).__name__}")
    for key in value:
        if not (str(key).isdecimal() and str(key).isascii()):
            raise CodeError(f"{name}: the state must be a dictionary by number, found the entry {key!r}")
    return {int(key): each for key, each in value.items()}


def saved_list(name: str, value: object, length: int | None = None) -> list[Any]:
    """Gives a list, of `length` entries where that is given; otherwise raises CodeError."""
    if not isinstance(value, list | tuple):
        raise CodeError(f"{name}: the state must have a list here, found {type(value).__name__}")
    if length is not None and len(value) != length:
        raise CodeError(f"{name}: the state must have {length} entries here, found {len(value)}")
    return list(value)


def saved_whole(name: str, value: object, low: int = 0) -> int:
    """Gives a whole number of `low` or more; otherwise raises CodeError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise CodeError(f"{name}: the state must have a whole number of {low} or more here, found {value!r:.60}")
    return value


def saved_shapes(name: str, value: object) -> list[tuple[int, ...]]:
    """Gives shapes of parameters; otherwise raises CodeError."""
    shapes = [
        tuple(saved_whole(f"{name}[{place}]", size) for size in saved_list(f"{name}[{place}]", shape))
        for place, shape in enumerate(saved_list(name, value))
    ]
    if sum(map(prod, shapes)) >= 2**48:
        raise CodeError(f"{name}: the state has shapes of more numbers than any memory holds")
    return shapes


def saved_tensor(name: str, value: object, shape: tuple[int | None, ...], finite: bool = True) -> Tensor:
    """Gives a dense tensor of floating point numbers of this shape (None: any size); otherwise raises CodeError."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise CodeError(f"{name}: the state must have a tensor of floating point numbers here, found {what}")
    fits = value.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ["any" if size is None else size for size in shape]
        raise CodeError(f"{name}: the state must have a tensor of shape {wanted} here, found {list(value.shape)}")
    if finite and not bool(value.isfinite().all()):
        raise CodeError(f"{name}: the state has numbers here that are not finite")
    return value
