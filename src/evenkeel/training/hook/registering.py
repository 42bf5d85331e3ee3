"""Registers the hook with a DistributedDataParallel, after it has seen that model and state fit each other."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evenkeel.errors import ConfigurationError
from evenkeel.training.hook.ddp_hook import comm_hook
from evenkeel.training.hook.hook_state import HookState
from evenkeel.training.hook.pipe_sgd import PipeSGD

__all__ = ["register"]

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def register(ddp_model: nn.Module, state: HookState | PipeSGD) -> None:
    """Has `state` average the gradients of `ddp_model`; in place of `register_comm_hook`, and with checks.

    The state exchanges over the ranks of the model's own process group, whichever these are. Call it on each of them.
    Where the hook has not run when the process ends, a warning says so.

    Args:
        ddp_model: a DistributedDataParallel, compiled or not.
        state: made for this model alone.

    Raises:
        ConfigurationError: the model or the state is of another kind or in use, or they do not fit each other.
    """
    model: Any = getattr(ddp_model, "_orig_mod", ddp_model)
    if not isinstance(model, DistributedDataParallel):
        raise ConfigurationError(
            f"register needs a DistributedDataParallel, found {type(model).__name__}: wrap the model first; "
            "FullyShardedDataParallel and fully_shard are not supported"
        )
    if not isinstance(state, HookState | PipeSGD):
        raise ConfigurationError(f"register needs a HookState or a PipeSGD, such as HookState(THC()), found {state!r}")
    if getattr(model, "_comm_hooks", None):
        raise ConfigurationError("this model has a communication hook already: DistributedDataParallel takes one")
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.config.optimize_ddp == "python_reducer":
        raise ConfigurationError('torch._dynamo.config.optimize_ddp must not be "python_reducer": it has no buckets')
    ignored: set[str] = getattr(model, "parameters_to_ignore", set())
    averaged = {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    }
    for name, parameter in averaged.items():
        if parameter.dtype not in _DTYPES:
            raise ConfigurationError(f"parameter {name} is of {parameter.dtype}, whose gradients cannot be averaged")
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ConfigurationError(
                f"{name or type(module).__name__} has sparse gradients, which cannot be added: make it sparse=False"
            )
    state.fit(list(averaged.values()), model.process_group)
    model.register_comm_hook(state, comm_hook)
