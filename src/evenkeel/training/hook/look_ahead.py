"""Computes gradients at the weights that they will be applied to: it foresees Pipe-SGD's own delay."""

import copy
import functools
import inspect
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.futures import Future

from evenkeel.errors import ConfigurationError
from evenkeel.training.hook.buckets import as_gradient_of

__all__ = ["LookAhead", "before_gradients_are_applied"]

_NO_TRIAL = {"LBFGS", "ZeroRedundancyOptimizer"}
_EagerFunction = TypeVar("_EagerFunction", bound=Callable[..., None])


def _eagerly(function: _EagerFunction) -> _EagerFunction:
    """Keeps a hook out of the graph of a compiled model."""
    return cast(_EagerFunction, vars(torch)["_disable_dynamo"](function))


class LookAhead:
    """Lets a model's training passes see its weights one step ahead.

    The average of the step before still travels while a step computes, so the step's gradient will be applied to
    weights that are not known yet. But this rank knows its own part of that average. So the optimizers take a trial
    step with it, on copies of the weights and of their state, and the forward and backward pass see these weights. With
    momentum most of that step is known exactly; the rest is as wrong as one rank's gradient is noisy.

    The weights that are ahead differ from rank to rank, so nobody else may see them: they are put in the parameters'
    places when a forward pass of training begins and taken out when it ends, and likewise for a backward pass through
    its outputs, however either ends. Whatever runs at any other time - evaluation, averages of weights, copies - finds
    the true ones, and `state_dict` gives them even while such a pass runs, as when a signal asks for a checkpoint.

    A trial gradient is scaled as the user scaled the latest average before the optimizer applied it (clipping by norm,
    a GradScaler's `unscale_`); their norms give the scale.

    Source: weights are predicted against a pipeline's delay in SpecTrain (Chen, Yang and Cheng, 2018; from momentum
    alone) and SAPipe (Chen et al., NeurIPS 2022). That any optimizer takes a trial step, scaled so, is ours.
    """

    def __init__(self) -> None:
        self._trials: list[_Trial] = []
        self._own: dict[Tensor, Tensor] = {}  # of the average under way, by parameter
        self._given: dict[Tensor, tuple[Future[Tensor], int, int]] = {}  # where an older average is, and how long
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint, until the first pass knows the optimizers
        self._ahead: dict[Tensor, Tensor] = {}  # weights one step ahead, by parameter
        self._copies = _Copies()
        self._ready = False  # they are a trial step from the true weights with the average under way
        self._step = 0  # tells which step a graph is of
        self._true: dict[Tensor, Tensor] | None = None  # the weights, while the parameters hold others
        self._within: object = None  # the pass that the parameters hold others for
        self._last_pass: str | None = None  # of the model since the last step: forward "ahead" or "true", or "back"

    def __reduce__(self) -> tuple[type["LookAhead"], tuple[()]]:
        return LookAhead, ()  # a copy of a model has its hooks, but no optimizer

    @property
    def attached(self) -> bool:
        """True when there is a model that looks ahead."""
        return bool(self._trials)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Sequence[Any]:
        """Lets `model`'s training passes look ahead by steps of `optimizer`, besides those attached before.

        Returns:
            Handles whose `remove` undoes it.

        Raises:
            ConfigurationError: the optimizer cannot take a step on trial, or is attached already.
        """
        if not _NO_TRIAL.isdisjoint(base.__name__ for base in type(optimizer).__mro__):
            raise ConfigurationError(
                f"look_ahead: {type(optimizer).__name__} cannot take a step on trial, since a step of it computes "
                "gradients or exchanges weights; leave look_ahead out"
            )
        if any(trial.optimizer is optimizer for trial in self._trials):
            raise ConfigurationError("look_ahead: this optimizer is attached already; attach each of them once")
        trial = _Trial(optimizer)
        self._trials.append(trial)
        # What torch.compile wraps a model in has hooks of its own, which do not belong to the model.
        model = getattr(model, "_orig_mod", model)
        return (
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
            # PyTorch marks this hook with an attribute, which methods cannot have.
            *(
                each.register_state_dict_post_hook(functools.partial(self._after_state_dict))
                for each in model.modules()
            ),
            before_gradients_are_applied(optimizer, self._before_applying),
            _Removal(lambda: self._detach(trial)),
        )

    def begin_step(self, in_backward: bool) -> None:
        """Takes note that a backward pass shows its gradients; what the one before left has served.

        Args:
            in_backward: false where there is none, on ranks that have run out of inputs.

        Raises:
            ConfigurationError: the pass does not see the weights that it should.
        """
        if self._trials and in_backward:
            if self._last_pass is None:
                raise ConfigurationError(
                    "look_ahead: a backward pass without a forward pass of the model that was given. Call that model, "
                    "not one inside of it, and attach before it is first called where it is compiled"
                )
            if self._last_pass == "ahead":
                raise ConfigurationError(
                    "look_ahead: the backward pass did not come through what the model's forward pass returned: return "
                    "what the loss is made of, as tensors, or in lists, dictionaries or plain objects"
                )
        self._own, self._given, self._loaded = {}, {}, None
        self._ready, self._last_pass = False, None
        self._step += 1

    def keep(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], given: "Future[Tensor]") -> None:
        """Remembers this rank's part of an average under way, and the older average that is given meanwhile."""
        if not self._trials:
            return
        tried, offset = set(self._parameters()), 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter in tried:
                self._own[parameter] = as_gradient_of(parameter, gradient.clone())
                self._given[parameter] = (given, offset, gradient.numel())
            offset += gradient.numel()

    def warn_of_others(self, parameters: Iterable[Tensor]) -> None:
        """Warns where some of the model's `parameters` are in no optimizer that was attached."""
        tried = set(self._parameters())
        others = sum(parameter not in tried for parameter in parameters)
        if self._trials and others:
            warnings.warn(
                f"look_ahead: {others} of the model's parameters are in no optimizer that was attached with "
                "look_ahead, so their gradients stay one step old; attach every optimizer of the model",
                stacklevel=2,
            )

    def empty(self) -> None:
        """Forgets what is under way."""
        self._leave()
        self.begin_step(in_backward=False)

    def true_weights(self, parameter: Tensor) -> Tensor:
        """Gives the weights that all ranks share, whatever the parameter holds within a pass."""
        return parameter if self._true is None else self._true.get(parameter, parameter)

    def state_dict(self) -> dict[str, Any]:
        """Gives what a resume needs to look ahead to the same weights."""
        if self._loaded is not None:
            return copy.deepcopy(dict(self._loaded))
        own = {place: self._own[each].clone() for place, each in enumerate(self._parameters()) if each in self._own}
        scales = [trial.scale for trial in self._trials]
        return {"own": own, "scale": scales if len(scales) > 1 else scales[0] if scales else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with the optimizers attached in the same order."""
        self._loaded = copy.deepcopy(dict(state))

    def _parameters(self) -> list[Tensor]:
        return [parameter for trial in self._trials for parameter in trial.parameters()]

    def _detach(self, trial: "_Trial") -> None:
        self._leave()
        self._trials = [each for each in self._trials if each is not trial]
        self._ready = False

    def _take_over(self, state: Mapping[str, Any]) -> None:
        parameters, scales = self._parameters(), state["scale"]
        for place, gradient in state["own"].items():
            if int(place) >= len(parameters) or parameters[int(place)].shape != gradient.shape:
                raise ConfigurationError(
                    "look_ahead: the state that was loaded is of other optimizers, or of the same in another order; "
                    "attach them as when it was saved"
                )
            self._own[parameters[int(place)]] = gradient.clone()
        for trial, scale in zip(self._trials, scales if isinstance(scales, list) else [scales], strict=False):
            trial.scale = scale
        self._loaded = None

    @_eagerly
    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if self._true is not None or not self._trials or not torch.is_grad_enabled():
            return  # within a pass already; or no gradients will come of this one
        self._last_pass = "true"
        if not model.training:
            return
        if self._loaded is not None:
            self._take_over(self._loaded)
        if self._ready or self._can_try():
            self._enter("forward")
            self._last_pass = "ahead"

    @_eagerly
    def _after_forward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self._within != "forward":
            return
        self._leave()
        step = self._step
        for tensor in _tensors_in(output):
            if tensor.requires_grad and not tensor.is_leaf:
                add_hook: Any = tensor.register_hook
                add_hook(lambda gradient: self._begin_backward(step))

    def _begin_backward(self, step: int) -> None:
        self._last_pass = "back"
        if self._true is not None:
            return
        if torch.is_grad_enabled():
            raise ConfigurationError(
                "look_ahead: gradients of gradients (create_graph=True) would be of two different weights; leave "
                "look_ahead out"
            )
        if step != self._step:
            raise ConfigurationError(
                "look_ahead: a backward pass through a forward pass of an earlier step, whose weights are gone; call "
                "backward before the next step's, or leave look_ahead out"
            )

        def end() -> None:
            self._leave(end_of=token)

        token = object()
        self._enter(token)
        # A pass that fails calls nobody back, but lets go of whom it would have called.
        weakref.finalize(end, self._leave, end_of=token).atexit = False
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _can_try(self) -> bool:
        known = any(trial.scale is not None for trial in self._trials)
        return bool(self._own) and known and math.isfinite(_norm(self._own.values()))

    def _enter(self, within: object) -> None:
        """Puts the weights that are ahead in the parameters' places, which costs no copy and autograd does not note."""
        tries = not self._ready
        if tries:
            self._ahead = self._copies.of(self._parameters())
        self._true, self._within = {}, within
        for parameter, weights in self._ahead.items():
            self._true[parameter] = parameter.data
            parameter.data = weights
        torch.clear_autocast_cache()
        if tries:
            try:
                for trial in self._trials:
                    trial.step(self._own)
            except BaseException:
                self._leave()
                raise
            self._ready = True

    def _leave(self, end_of: object = None) -> None:
        """Puts the true weights back, unless it is the end of a pass that they are out of place for no more."""
        if self._true is None or (end_of is not None and end_of is not self._within):
            return
        for parameter, weights in self._true.items():
            parameter.data = weights
        self._true = self._within = None
        torch.clear_autocast_cache()  # which may hold weights of this pass in half precision

    def _after_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Puts the true weights of `module`'s own parameters in the places of those that are ahead."""
        for name, parameter in module.named_parameters(recurse=False):
            if self._true is not None and parameter in self._true and prefix + name in state:
                state[prefix + name] = self._true[parameter]

    def _before_applying(self, optimizer: torch.optim.Optimizer) -> None:
        self._leave()
        self._ready = False
        for trial in self._trials:
            if trial.optimizer is optimizer:
                trial.note_scale(self._given)


def before_gradients_are_applied(optimizer: torch.optim.Optimizer, act: Callable[[torch.optim.Optimizer], None]) -> Any:
    """Has `act` called within each step of `optimizer`, when the gradients are there: after its closure, if it has one.

    Returns:
        A handle whose `remove` undoes it.
    """

    def before_step(stepping: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            act(stepping)
            return None

        def computed() -> Any:
            loss = closure()
            act(stepping)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": computed}
        return (args[0], computed, *args[2:]), kwargs

    return optimizer.register_step_pre_hook(before_step)


class _Trial:
    """Takes steps of an optimizer that leave it as it was.

    Attributes:
        optimizer: as given.
        scale: what it applied last, over what it was given: norms.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.scale: float | None = None

    def parameters(self) -> list[Tensor]:
        """Gives all of the optimizer's, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Steps with `gradients`, by parameter, where they have a scale; all but the weights is as before then."""
        if self.scale is None:
            return
        optimizer, parameters = self.optimizer, self.parameters()
        held = [parameter.grad for parameter in parameters]
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        state = optimizer.state
        optimizer.state = defaultdict(dict, {parameter: _copied(values) for parameter, values in state.items()})
        try:
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(copy.deepcopy(setting))
            for parameter in parameters:
                own = gradients.get(parameter)
                parameter.grad = None if own is None else own * self.scale
            with torch.no_grad():
                # Without the hooks that others have put on steps: this is none.
                inspect.unwrap(type(optimizer).step)(optimizer)
        finally:
            optimizer.state = state
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient

    def note_scale(self, given: Mapping[Tensor, tuple["Future[Tensor]", int, int]]) -> None:
        """Compares the gradients that are about to be applied with those that were `given`."""
        # Parameter by parameter, so that the ratio of the same numbers is one however DDP lays out its buckets.
        parameters = self.parameters()
        before = _norm(given[each][0].value().narrow(0, *given[each][1:]) for each in parameters if each in given)
        applied = _norm(parameter.grad for parameter in parameters if parameter.grad is not None)
        # A fused step divides by the loss scale itself, where a GradScaler has put it on the optimizer.
        applied /= float(getattr(self.optimizer, "grad_scale", None) or 1.0)
        if before > 0 and math.isfinite(applied / before):
            self.scale = applied / before


@dataclass(frozen=True)
class _Removal:
    """Removes what it was made for, as PyTorch's own handles do."""

    remove: Callable[[], None]


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """Gives the tensors of what a model returned, in containers and plain objects of any depth."""
    seen: set[int] = set()
    waiting = [output]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, nn.Module | type):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += each
        else:
            waiting += getattr(each, "__dict__", {}).values()


class _Copies:
    """Copies parameters with the memory that they lie in, so that those that share some, or lie in one row, go on so.

    It is the same memory every time, as far as possible: compiled graphs may rely on where weights are.
    """

    def __init__(self) -> None:
        self._memory: dict[int, torch.UntypedStorage] = {}  # by the address of what it is a copy of

    def of(self, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Gives a copy of each."""
        copied: dict[int, torch.UntypedStorage] = {}
        found = {}
        for parameter in parameters:
            memory: Any = parameter.data.untyped_storage()
            address = memory.data_ptr()
            if address not in copied:
                kept = self._memory.get(address)
                fits = kept is not None and (kept.nbytes(), kept.device) == (memory.nbytes(), memory.device)
                copied[address] = kept.copy_(memory, False) if kept is not None and fits else memory.clone()
            place = parameter.storage_offset(), parameter.size(), parameter.stride()
            found[parameter] = parameter.data.new_empty(0).set_(copied[address], *place)
        self._memory = copied
        return found


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in values.items()
    }


def _norm(tensors: Iterable[Tensor]) -> float:
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    norms = [torch.linalg.vector_norm(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in real]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
