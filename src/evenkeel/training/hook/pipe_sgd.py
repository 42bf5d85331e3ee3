"""Runs Pipe-SGD: applies the average of the step before while the gradients of this one travel."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from evenkeel.coding.checks import whole
from evenkeel.coding.saved_state import saved_fields, saved_list, saved_numbers, saved_tensor, saved_whole
from evenkeel.errors import CodeError, ConfigurationError, EvenkeelError
from evenkeel.training.hook.buckets import (
    Bucket,
    BucketCopy,
    as_gradient_of,
    gradient_views,
    raise_failures_of,
    runs_backward,
)
from evenkeel.training.hook.checks import (
    check_loss_scale,
    check_pickles,
    check_saved_state,
    count_tensors,
    warn_of_lost_tensors,
)
from evenkeel.training.hook.ddp_hook import comm_hook
from evenkeel.training.hook.hook_state import HookState
from evenkeel.training.hook.look_ahead import LookAhead, before_gradients_are_applied
from evenkeel.training.hook.parameter_book import ParameterBook
from evenkeel.training.hook.stats import HookStats

__all__ = ["PipeSGD"]


class Attachment:
    """Holds what `attach` has put on an optimizer and a model."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Takes it off again."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class _PendingAverage:
    """Holds one bucket's average on its way: its parameters by number, and the loss scale that its gradients carry."""

    members: tuple[int, ...]
    sizes: list[int]
    average: "Future[Tensor]"
    loss_scale: float


class PipeSGD:
    """Hides communication behind the next step's computation, as a state for `comm_hook`.

        pipe = evenkeel.PipeSGD(evenkeel.HookState(evenkeel.THC(bits=4)), warmup_steps=500)
        ddp_model.register_comm_hook(pipe, evenkeel.comm_hook)
        pipe.attach(optimizer)

    Step t is given the average of step t-1. All ranks apply the same averages in the same order. Three moments are
    special:

    - The first pipelined step has nothing to apply: its gradients are zeros and `skip_step` is true. An optimizer that
      was attached does nothing then, not even weight decay or momentum; without `attach`, write
      `if not pipe.skip_step: optimizer.step()`. Do the same around `scheduler.step()`. With a GradScaler,
      `scaler.unscale_`, `scaler.step` and `scaler.update()` all belong under `if not pipe.skip_step:`, unless the
      optimizer is attached: a scaler cannot be updated without a step.
    - At the end one average is still unused: `if pipe.flush(): optimizer.step()`. Nothing needs flushing when the
      warm-up ends, as its steps apply their own averages.
    - A checkpoint holds the averages in flight: `state_dict` waits for them.

    Clipping and weight decay act as usual, on the older average and on today's weights. A parameter that no rank used
    in a step is not updated by DDP in it, so what the step before found for it is dropped.

    Source: Li et al., "Pipe-SGD" (NeurIPS 2018). Departure: width 2 only, since a longer pipeline hides no more (the
    step takes max(computation, communication) for any width from 2 up) and its gradients are older.

    Args:
        state: averages the buckets; None for plain averages.
        hook: what `state` belongs to; any Python hook whose collectives run on a group of their own will do.
        width: how many steps are under way at once; 2.
        warmup_steps: so many steps apply their own averages first, while gradients change fast.
        loss_scale: the loss scale of the step under way, e.g. `scaler.get_scale`: with it an average from a step with
            another scale is converted. Default: the one of `state`.

    Attributes:
        skip_step: the gradients of the latest backward pass are only zeros, as the pipeline was empty.
    """

    def __init__(
        self,
        state: Any = None,
        *,
        hook: Callable[[Any, Any], "Future[Tensor]"] = comm_hook,
        width: int = 2,
        warmup_steps: int = 0,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        if width != 2:
            raise ConfigurationError(f"width must be 2, found {width!r}: a wider pipeline is not faster, only staler")
        if state is None and hook is not comm_hook:
            raise ConfigurationError("hook was given without its state: pass the state that the hook expects")
        check_loss_scale(loss_scale)
        self._warmup_steps = whole("warmup_steps", warmup_steps, 0)
        self.skip_step = False
        self._state = HookState(None) if state is None else state
        self._hook = hook
        self._loss_scale = loss_scale or getattr(state, "loss_scale", None)
        self._scale = 1.0
        self._step = 0
        self._steps_here = 0
        self._book = ParameterBook()
        self._geometry: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self._begun = False  # a step's first bucket was seen, its last one was not
        self._before: list[_PendingAverage] = []
        self._now: list[_PendingAverage] = []
        self._landed: dict[int, Tensor] = {}
        self._ahead = LookAhead()
        if isinstance(self._state, HookState):
            self._state.shared_weights = self._ahead.true_weights

    def average(self, bucket: Bucket) -> "Future[Tensor]":
        """Gives the bucket's average of the step before. For `comm_hook`."""
        views = gradient_views(bucket)
        members = self._book.numbers(bucket.parameters())
        if not self._begun:
            self._begin_step(bucket)
        last = bucket.is_last()
        for number, view in zip(members, views, strict=True):
            self._geometry[number] = (view.size(), view.stride())
        if self._step < self._warmup_steps:
            answer = self._hook(self._state, bucket)
        else:
            original = bucket.buffer()
            average = self._hook(self._state, BucketCopy(bucket))
            sizes = [view.numel() for view in views]
            self._now.append(_PendingAverage(members, sizes, average, self._scale))
            answer = self._of_step_before(members, original)
            self._ahead.keep(bucket.parameters(), views, answer)
        if last:
            self._end_step()
        return answer

    def fit(self, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Prepares the state for a model whose `parameters` are averaged over `group`. For `register`.

        Raises:
            ConfigurationError: they do not fit, or the state has a model already.
        """
        if isinstance(self._state, HookState):
            self._state.fit(parameters, group)

    def attach(self, optimizer: torch.optim.Optimizer, *, look_ahead: nn.Module | None = None) -> "Attachment":
        """Lets `optimizer` do nothing in steps that have no gradients yet.

        Args:
            optimizer: of the model.
            look_ahead: the DDP model. Its passes in training then see the weights as they would be if the average under
                way were this rank's own gradient, so that gradients fit the weights that they are applied to. Outside
                of these passes, and in all others, the weights are the true ones, which are the same on all ranks.
                Costs a step of the optimizer and a copy of weights, gradients and its state. Attach every optimizer of
                the model so.

        Returns:
            A handle whose `remove` undoes it.

        Raises:
            ConfigurationError: an optimizer whose steps cannot be tried, or that looks ahead already.
        """
        pipe = weakref.ref(self)

        def without_gradients(stepping: torch.optim.Optimizer) -> None:
            attached = pipe()
            if attached is not None and attached.skip_step:
                # Optimizers pass over parameters without a gradient, their momentum and weight decay included.
                for group in stepping.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

        handles = [] if look_ahead is None else self._ahead.attach(look_ahead, optimizer)
        return Attachment([*handles, before_gradients_are_applied(optimizer, without_gradients)])

    def flush(self) -> bool:
        """Puts the averages still unused into the parameters' `grad`; False when there are none.

        The pipeline is empty afterwards: should training go on, its next step is a first one again.

        Raises:
            ReducerError: a peer was lost before the averages were in.
        """
        if not self._before:
            return False
        if not self._book.sizes:
            raise ConfigurationError("flush before the first step after a resume: the state has not seen the model yet")
        scale = self._scale_now()
        self._land(self._before, scale)
        for number, average in self._landed.items():
            size, stride = self._geometry[number]
            parameter = self._book.parameters[number]
            parameter.grad = as_gradient_of(parameter, average.clone().as_strided(size, stride))
        self._before, self._landed = [], {}
        self._ahead.empty()
        self.skip_step = False
        return True

    def stats(self) -> HookStats:
        """Gives what compression has cost and saved on this rank so far, as `state` counts it.

        Raises:
            ConfigurationError: `state` is another hook's, which counts nothing.
        """
        if not isinstance(self._state, HookState):
            raise ConfigurationError(f"only a HookState counts costs, but the hook's state is {self._state!r}")
        return self._state.stats()

    def close(self) -> None:
        """Closes `state`, where it can be closed, after what is under way. Neither can be used any more."""
        close = getattr(self._state, "close", None)
        if close is not None:
            close()

    def state_dict(self) -> dict[str, Any]:
        """Gives what a resume needs on this rank, in tensors and plain values; waits for the sums in flight."""
        if self._begun:
            raise ConfigurationError(
                "state_dict was called within a backward pass, or after one that failed: call it between two steps"
            )
        inner = getattr(self._state, "state_dict", None)
        # By name, since torch.distributed.checkpoint fails where a list has another length in a new state.
        flights = {str(place): flight for place, flight in enumerate(self._flights())}
        look_ahead = self._ahead.state_dict()
        return {
            "step": self._step,
            "flights": flights,
            "look_ahead": look_ahead,
            "state": inner() if inner is not None else {},
            "tensors": count_tensors((flights, look_ahead)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; before the first step.

        Where averages in flight are missing, since `torch.distributed.checkpoint` fills in only what a state has
        already, the pipeline starts empty, with a warning.

        Raises:
            ConfigurationError: it is no state of a PipeSGD, or a step was taken. Nothing has been loaded then.
        """
        if self._steps_here or self._begun:
            raise ConfigurationError("load_state_dict must be called before the first step")
        check_saved_state(state, "PipeSGD")
        check_saved_state(state["look_ahead"], "LookAhead")
        flights, look_ahead = state["flights"], state["look_ahead"]
        # Older files have a list.
        try:
            step = saved_whole("step", state["step"])
            saved_whole("tensors", state.get("tensors", 0))
            _check_look_ahead(look_ahead)
            listed = list(saved_numbers("flights", flights).values()) if isinstance(flights, Mapping) else flights
            before = [_landed(_checked_flight(each)) for each in saved_list("flights", listed)]
        except CodeError as error:
            raise ConfigurationError(f"this state cannot be loaded, and nothing of it was: {error}") from error
        inner = getattr(self._state, "load_state_dict", None)
        if inner is not None:
            inner(state["state"])
        found = count_tensors((flights, look_ahead))
        if warn_of_lost_tensors(
            state.get("tensors", found), found, "the pipeline starts empty, without the last average"
        ):
            before, look_ahead = [], LookAhead().state_dict()
        self._ahead.load_state_dict(look_ahead)
        self._step, self._before = step, before

    def __deepcopy__(self, memo: dict[int, Any]) -> "PipeSGD":
        make, parts = self._parts()
        copied: PipeSGD = make(*copy.deepcopy(parts, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        check_pickles(hook=self._hook, loss_scale=self._loss_scale)
        return self._parts()

    def _parts(self) -> tuple[Any, ...]:
        """Gives what copies and pickles are made of: settings and averages in flight, but nothing that was attached."""
        settings = {
            "state": self._state,
            "hook": self._hook,
            "warmup_steps": self._warmup_steps,
            "loss_scale": self._loss_scale,
        }
        try:
            flights = self._flights()
        except EvenkeelError:  # a peer was lost: no average will come
            flights = []
        return _copy_of, (type(self), settings, self._step, flights)

    def _flights(self) -> list[dict[str, Any]]:
        return [
            {
                "members": list(flight.members),
                "sizes": flight.sizes,
                "average": flight.average.wait().clone(),
                "loss_scale": flight.loss_scale,
            }
            for flight in self._before
        ]

    def _begin_step(self, bucket: object) -> None:
        self._begun = True
        self._scale = self._scale_now()
        if isinstance(self._state, HookState):
            self._state.schedule = (
                f"PipeSGD at step {self._step}, warmup_steps={self._warmup_steps}, "
                f"{len(self._before)} buckets in flight{', looking ahead' if self._ahead.attached else ''}"
            )
        self.skip_step = self._step >= self._warmup_steps and not self._before
        raise_failures_of([flight.average for flight in self._before], bucket)
        self._ahead.begin_step(runs_backward(bucket))

    def _end_step(self) -> None:
        self._book.close()
        self._begun = False
        if self._steps_here == 0:
            self._ahead.warn_of_others(self._book.parameters)
        self._steps_here += 1
        self._step += 1
        self._before, self._now, self._landed = self._now, [], {}

    def _scale_now(self) -> float:
        return 1.0 if self._loss_scale is None else float(self._loss_scale())

    def _of_step_before(self, members: tuple[int, ...], original: Tensor) -> "Future[Tensor]":
        if self.skip_step:
            return _done(torch.zeros_like(original))
        for flight in self._before:
            if flight.members == members:
                return flight.average.then(_scaled_by(self._scale / flight.loss_scale))
        # DDP has rebuilt its buckets since, which happens once in a process.
        if not self._landed:
            self._land(self._before, self._scale)
        pieces = [self._landed[number] for number in members if number in self._landed]
        average = torch.cat(pieces) if pieces else original.new_empty(0)
        if len(pieces) != len(members) or average.numel() != original.numel():
            raise ConfigurationError("the averages in flight belong to another model: load the state of this one")
        return _done(average.to(original))

    def _land(self, flights: list[_PendingAverage], scale: float) -> None:
        for flight in flights:
            average = flight.average.wait() * (scale / flight.loss_scale)
            self._landed |= zip(flight.members, torch.split(average, flight.sizes), strict=True)


def _copy_of(kind: type[PipeSGD], settings: dict[str, Any], step: int, flights: list[dict[str, Any]]) -> PipeSGD:
    pipe = kind(**settings)
    pipe._step, pipe._before = step, [_landed(flight) for flight in flights]
    return pipe


def _landed(flight: dict[str, Any]) -> _PendingAverage:
    average = _done(flight["average"].clone())
    return _PendingAverage(tuple(flight["members"]), flight["sizes"], average, flight["loss_scale"])


def _checked_flight(flight: object) -> dict[str, Any]:
    """Gives a well-formed saved average, whose numbers need not be finite; otherwise raises CodeError."""
    saved = dict(saved_fields("flights", flight, ("members", "sizes", "average", "loss_scale")))
    members = [saved_whole("flights.members", each) for each in saved_list("flights.members", saved["members"])]
    sizes = [saved_whole("flights.sizes", each) for each in saved_list("flights.sizes", saved["sizes"], len(members))]
    saved_tensor("flights.average", saved["average"], (sum(sizes),), finite=False)
    scale = saved["loss_scale"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < inf:
        raise CodeError(f"flights.loss_scale: the state must have a number above zero here, found {scale!r:.60}")
    return saved | {"sizes": sizes}


def _check_look_ahead(state: Mapping[str, Any]) -> None:
    for place, own in saved_numbers("look_ahead.own", state["own"]).items():
        if not isinstance(own, Tensor) or not own.is_floating_point():
            raise CodeError(f"look_ahead.own[{place}]: the state must have a tensor of floating point numbers here")
    scales = state["scale"] if isinstance(state["scale"], list) else [state["scale"]]
    if not all(scale is None or isinstance(scale, float) for scale in scales):
        raise CodeError("look_ahead.scale: the state must have a number, None, or a list of these here")


def _scaled_by(ratio: float) -> Callable[["Future[Tensor]"], Tensor]:
    def scaled(future: "Future[Tensor]") -> Tensor:
        average = future.wait()
        return average if ratio == 1 else average * ratio

    return scaled


def _done(value: Tensor) -> "Future[Tensor]":
    future: Future[Tensor] = Future()
    future.set_result(value)
    return future
