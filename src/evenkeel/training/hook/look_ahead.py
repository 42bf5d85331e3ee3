"""Gradients at the weights that they will be applied to: Pipe-SGD's own delay, foreseen."""

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future

from evenkeel.errors import ConfigurationError
from evenkeel.training.hook.buckets import as_gradient_of

__all__ = ["LookAhead"]

_NO_TRIAL = {"LBFGS", "ZeroRedundancyOptimizer"}


class LookAhead:
    """Moves a model's weights one step ahead for each forward and backward pass of training, and back after it.

    The average of the step before still travels while a step computes, so the step's gradient will be applied to
    weights that are not known yet. But this rank knows its own part of that average. So the optimizer takes a trial
    step with it, on a copy of its state, the forward and backward pass see the weights where that leads, and the true
    weights are in their places again when the backward pass has ended. With momentum most of that step is known
    exactly; the rest is as wrong as one rank's gradient is noisy.

    The trial gradient is scaled as the user scaled the latest average before the optimizer applied it (clipping by
    norm, a GradScaler's `unscale_`), told by their norms.

    Source: weights are predicted against a pipeline's delay in SpecTrain (Chen, Yang and Cheng, 2018; from momentum
    alone) and SAPipe (Chen et al., NeurIPS 2022). That any optimizer takes a trial step, scaled so, is ours.
    """

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._places: dict[int, int] = {}  # in the optimizer's order of parameters, by their id
        self._own: dict[int, Tensor] = {}  # of the average under way, by place
        self._scale: float | None = None  # of what the optimizer applied, over what it was given
        self._given: dict[
            int, tuple[Future[Tensor], int, int]
        ] = {}  # by place: where an older average is, and how long
        self._true: list[Tensor] | None = None  # the weights, while the model's are ahead of them

    @property
    def attached(self) -> bool:
        """True when there is a model that looks ahead."""
        return self._optimizer is not None

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Sequence[Any]:
        """Look ahead in `model`'s forward passes; returns handles whose `remove` undoes it.

        Raises:
            ConfigurationError: the optimizer cannot take a step on trial.
        """
        if not _NO_TRIAL.isdisjoint(base.__name__ for base in type(optimizer).__mro__):
            raise ConfigurationError(
                f"look_ahead: {type(optimizer).__name__} cannot take a step on trial, since a step of it computes "
                "gradients or exchanges weights; leave look_ahead out"
            )
        self._optimizer = optimizer
        return (
            model.register_forward_pre_hook(self._before_forward),
            optimizer.register_step_pre_hook(self._before_step),
        )

    def begin_step(self) -> None:
        """A backward pass has begun to show its gradients; what the last one left has served."""
        self._own, self._given = {}, {}
        if self._optimizer is not None:
            self._places = {id(parameter): place for place, parameter in enumerate(self._parameters())}

    def keep(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], given: "Future[Tensor]") -> None:
        """Remember this rank's part of an average under way, and the older average that is given meanwhile."""
        if self._optimizer is None:
            return
        offset = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            place = self._places.get(id(parameter))
            if place is not None:
                self._own[place] = as_gradient_of(parameter, gradient.clone())
                self._given[place] = (given, offset, gradient.numel())
            offset += gradient.numel()

    def end_step(self) -> None:
        """Let the weights be the true ones when the backward pass under way has ended."""
        if self._true is not None:
            # As DDP does to wait for its own buckets. Until then layers may still need the weights.
            torch.autograd.Variable._execution_engine.queue_callback(self.settle)

    def settle(self) -> None:
        """The true weights, now."""
        if self._true is not None:
            with torch.no_grad():
                for parameter, true in zip(self._parameters(), self._true, strict=True):
                    parameter.copy_(true)
            self._true = None

    def empty(self) -> None:
        """Nothing is under way any more."""
        self.settle()
        self.begin_step()

    def true_weights(self, parameter: Tensor) -> Tensor:
        """The parameter's weights that all ranks share, whatever it holds within a pass."""
        place = self._places.get(id(parameter))
        return parameter if self._true is None or place is None else self._true[place]

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to look ahead to the same weights.

        Raises:
            ConfigurationError: the model's weights are not the true ones now.
        """
        if self._true is not None:
            raise ConfigurationError(
                "state_dict was called between a forward pass and its backward pass, while the weights are a step "
                "ahead: call it between two steps"
            )
        return {"own": {place: gradient.clone() for place, gradient in self._own.items()}, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._own = {int(place): gradient.clone() for place, gradient in state["own"].items()}
        self._scale = state["scale"]

    def _parameters(self) -> list[Tensor]:
        assert self._optimizer is not None
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if self._true is not None or not model.training or not torch.is_grad_enabled():
            return  # ahead already, in a step of several passes; or no gradients will come of this pass
        if self._own and self._scale is not None and math.isfinite(_norm(self._own.values())):
            self._go_ahead(self._scale)

    def _go_ahead(self, scale: float) -> None:
        optimizer, parameters = self._optimizer, self._parameters()
        assert optimizer is not None
        held = [parameter.grad for parameter in parameters]
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        state = optimizer.state
        self._true = [parameter.detach().clone() for parameter in parameters]
        optimizer.state = defaultdict(dict, {parameter: _copied(values) for parameter, values in state.items()})
        try:
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(copy.deepcopy(setting))
            for place, parameter in enumerate(parameters):
                own = self._own.get(place)
                parameter.grad = None if own is None else own * scale
            with torch.no_grad():
                # Without the hooks that others have put on steps: this is none.
                inspect.unwrap(type(optimizer).step)(optimizer)
        except BaseException:
            self.settle()
            raise
        finally:
            optimizer.state = state
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.settle()
        # Parameter by parameter, so that the ratio of the same numbers is one however DDP lays out its buckets.
        given = _norm(self._given[place][0].value().narrow(0, *self._given[place][1:]) for place in sorted(self._given))
        applied = _norm(parameter.grad for parameter in self._parameters() if parameter.grad is not None)
        if given > 0 and math.isfinite(applied / given):
            self._scale = applied / given


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in values.items()
    }


def _norm(tensors: Iterable[Tensor]) -> float:
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    norms = [torch.linalg.vector_norm(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in real]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
