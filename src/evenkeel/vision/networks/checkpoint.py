"""Writes checkpoints of trainings so that a whole one is always there, and refuses damaged ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evenkeel.errors import ConfigurationError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state`, weights and plain values, to `path`.

    Raises:
        ConfigurationError: the disk is full, or there is no such folder; the last checkpoint is kept.
    """
    unfinished = path.with_suffix(".part")
    try:
        torch.save(dict(state), unfinished)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        unfinished.unlink(missing_ok=True)
        raise ConfigurationError(
            f"checkpoint {path} cannot be written ({error}); free some space and resume, the last one is kept"
        ) from error
    unfinished.replace(path)  # a training that is stopped while it saves keeps the last whole one


def load_checkpoint(path: Path, *names: str) -> dict[str, Any]:
    """Reads what was saved at `path`, which holds all of `names`.

    Raises:
        ConfigurationError: it is damaged, or no checkpoint of such a training.
    """
    try:
        state = torch.load(path, weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(names):
            raise ValueError("it holds something else")
    except Exception as error:  # torch unpickles what stands there, and fails in whatever way the damage leads it to
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ConfigurationError(f"checkpoint {path} cannot be read ({first}); remove it to train anew") from error
    return state
