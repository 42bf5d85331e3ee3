"""Averages a model's gradients through a code, as the state of `comm_hook`."""

import atexit
import contextlib
import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from evenkeel.coding.checks import whole
from evenkeel.coding.saved_state import saved_list, saved_numbers, saved_whole
from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.float32 import Plain
from evenkeel.errors import CodeError, ConfigurationError, EvenkeelError
from evenkeel.reducers.ranks.group_collectives import GroupCollectives
from evenkeel.reducers.ranks.ordered_thread import OrderedThread
from evenkeel.reducers.reducer import Reducer
from evenkeel.reducers.sharded import Sharded
from evenkeel.training.hook.agreement import check_agreement
from evenkeel.training.hook.bucket_average import BucketPlan, Unit, average_bucket
from evenkeel.training.hook.buckets import Bucket, gradient_views, models_of, runs_backward
from evenkeel.training.hook.checks import (
    check_kind,
    check_loss_scale,
    check_pickles,
    check_saved_state,
    count_tensors,
    warn_of_lost_tensors,
)
from evenkeel.training.hook.parameter_book import ParameterBook, Units
from evenkeel.training.hook.same_weights import check_same_weights, digest, digests
from evenkeel.training.hook.skipping import Listed, Skip, few_dimensions, skip_rule
from evenkeel.training.hook.stats import HookStats, Meter
from evenkeel.training.hook.unwaited import Unwaited
from evenkeel.training.hook.warm_up import warm_up
from evenkeel.training.hook.zero_lines import scattered_zeros
from evenkeel.version import __version__

__all__ = ["HookState"]

# Often enough to save most of a training, seldom enough to pass over a code's steps of learning.
_STEPS_BETWEEN_ADVICE = 100
_MASKED_SHARE = 0.5
_log = logging.getLogger(__name__)
_WEIGHTS = "weights (DDP on a subgroup of ranks needs group=)"


class HookState:
    """Averages gradients through a code, with two lines in a DistributedDataParallel training.

        state = evenkeel.HookState(evenkeel.THC(bits=4))
        ddp_model.register_comm_hook(state, evenkeel.comm_hook)

    Make one for each DistributedDataParallel, with the same arguments on every rank: the first step compares them. All
    ranks get the same averages bit for bit. If a gradient of a bucket is not finite on any rank, its average is not on
    any, and error feedback does not take it in. (Where GradScaler then skips the step, what other buckets had sent in
    it is lost, as without compression.)

    Gradient accumulation (`no_sync`), AMP, `static_graph` and unused parameters work as without the hook. What is
    not compressed is averaged in its own type, half precision in float32; what is coded is coded in float32. All is
    returned in its own type. Complex gradients are averaged as their real and imaginary parts.

    A copy, or a pickle, has the settings and what is remembered, and exchanges over a group of its own; where a reducer
    or a group was given, its first step says that it needs a new one.

    To make one takes seconds where the code's kernels have never been compiled on this machine: see the log, at INFO.

    Args:
        code: turns gradients into messages that add up; None for plain averages.
        error_feedback: what a message lost is added to the next step's gradient. Takes one more copy of the gradients.
            A code that is an ErrorFeedback already is taken as it is.
        start_step: steps before this one are averaged uncompressed; at least 2, since DDP rebuilds its buckets after
            the first one.
        skip: what stays uncompressed. By default parameters of less than two dimensions: biases and norms. A list of
            modules and parameters, e.g. `[model.embedding]` or `evenkeel.named(model, "*embed*")`, stays so besides; a
            rule, parameter -> bool, decides alone; None compresses all.
        reducer: who adds; default: Sharded.
        group: a process group for nothing but this, where not all ranks take part; for the default reducer.
        timeout_s: how long a rank may stay silent; for the default reducer. Default: as long as in `group`, or in the
            default group.
        loss_scale: the loss scale of the step under way, for AMP: `scaler.get_scale`. With it, what is remembered from
            steps with another scale stays right.
        compare_weights_every: in the first step, and after so many steps each, the ranks compare digests of their
            weights, and end with an error that names what differs. None: never, where weights are meant to differ
            within a step.

    Attributes:
        loss_scale: as given.
        schedule: of what drives this state, such as a PipeSGD's settings; ranks compare it.
        shared_weights: parameter -> the weights that ranks compare; what drives this state may have moved the
            parameter's own for a moment.
    """

    def __init__(
        self,
        code: SumCode | None,
        *,
        error_feedback: bool = True,
        start_step: int = 2,
        skip: Skip = few_dimensions,
        reducer: Reducer | None = None,
        group: dist.ProcessGroup | None = None,
        timeout_s: float | None = None,
        loss_scale: Callable[[], float] | None = None,
        compare_weights_every: int | None = 50,
    ) -> None:
        check_kind("code", code, isinstance(code, SumCode), "a sum code such as THC(bits=4)")
        if whole("start_step", start_step) < 2:
            raise ConfigurationError(
                f"start_step must be 2 or more, found {start_step}: DDP rebuilds its buckets after the first step"
            )
        if reducer is not None and group is not None:
            raise ConfigurationError("give the group to the reducer itself, or give no reducer")
        check_kind("reducer", reducer, isinstance(reducer, Reducer), "a reducer such as evenkeel.Sharded()")
        of_this_rank = "a process group that this rank is in, as torch.distributed.new_group() makes it"
        check_kind("group", group, isinstance(group, dist.ProcessGroup), of_this_rank)
        check_loss_scale(loss_scale)
        if compare_weights_every is not None:
            whole("compare_weights_every", compare_weights_every, 1)
        self._compare_every = compare_weights_every
        self.loss_scale = loss_scale
        self.schedule = "as they come"
        self.shared_weights: Callable[[Tensor], Tensor] = Tensor.detach
        self._timeout_s = timeout_s
        self._group = group
        self._registered = False
        self._lacks = ""  # what a copy cannot take along
        wrap = error_feedback and not isinstance(code, ErrorFeedback)
        self._code = ErrorFeedback(code) if code is not None and wrap else code
        self._start_step = start_step
        self._skip = skip_rule(skip)
        self._skipped: dict[int, bool] = {}
        self._reducer = reducer if reducer is not None else Sharded(group, timeout_s=timeout_s)
        self._given = "group=" if group is not None else "reducer=" if reducer is not None else ""
        # A reducer of our own goes with the state; one that was given may serve another state later.
        at_end = self._reducer.close if reducer is None else _nothing
        self._thread = OrderedThread("evenkeel-gradients", self._reducer.close, at_end)
        self._book = ParameterBook()
        self._units = Units()
        self._meter = Meter()
        self._unwaited = Unwaited()
        self._step = 0
        self._steps_here = 0
        self._compressed_steps = 0
        self._scale = 1.0
        self._begun = False  # a step's first bucket was seen, its last one was not
        self._advised = False
        self._sizes_before: list[int] | None = None  # of the parameters of a state that was loaded
        if self._code is not None:
            warm_up(self._code, self._reducer.ranks)
        self._unused = object()
        if reducer is None:
            _UNUSED.add(self._unused)

    def average(self, bucket: Bucket) -> "Future[Tensor]":
        """Gives the future of the bucket's average, in its own buffer. For `comm_hook`."""
        if self._lacks:
            raise ConfigurationError(
                f"this state is a copy of one that was made with {self._lacks}, which cannot be copied: make a new "
                f"HookState with {self._lacks} for this model, and load_state_dict the other one's state_dict"
            )
        views, buffer, parameters = gradient_views(bucket), bucket.buffer(), list(bucket.parameters())
        members = self._book.numbers(parameters)
        self._check_sizes(members)
        first_step = self._steps_here == 0
        first_bucket = not self._begun
        if first_bucket:
            if first_step:
                self._check_group(parameters)
                self._warn_of_zeros()
            self._begun = True
            self._scale = 1.0 if self.loss_scale is None else float(self.loss_scale())
        plan = self._plan(buffer, members, views)
        if first_step and bucket.is_last() and isinstance(self._skip, Listed):
            self._skip.check(self._book.parameters)
        fields = self._fields(parameters) if first_step and first_bucket else None
        comparison = self._comparison(bucket) if bucket.is_last() else None
        future = self._thread.submit(lambda: self._round(buffer, plan, fields, comparison), buffer.device)
        if bucket.is_last():
            self._end_step()
        if first_step:
            # With a static graph, DDP waits for the first step's futures where their errors become mere texts.
            future.wait()
        return future

    def fit(self, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Prepares for a model whose `parameters` are averaged over `group`. For `register`.

        Raises:
            ConfigurationError: they do not fit, or the state has a model already.
        """
        if self._registered or self._steps_here or self._begun:
            raise ConfigurationError("this state has a model already: make one for each DistributedDataParallel")
        if self._lacks:
            raise ConfigurationError(f"this state is a copy of one made with {self._lacks}: make a new HookState")
        if isinstance(self._skip, Listed):
            self._skip.check(parameters)
        members = dist.get_process_group_ranks(group)
        if self._group is not None:
            if self._group is group:
                raise ConfigurationError("group: the model exchanges buffers on it; leave group out, or make another")
            if dist.get_process_group_ranks(self._group) != members:
                raise ConfigurationError(f"group: has other ranks than the model's, which are {members}; leave it out")
        elif self._given:
            if self._reducer.ranks.world != len(members):
                raise ConfigurationError(
                    f"the reducer has {self._reducer.ranks.world} ranks, but the model {len(members)}: {members}"
                )
        elif len(members) != dist.get_world_size():
            self._thread.close()
            wait = None if self._timeout_s is None else timedelta(seconds=self._timeout_s)
            # Only its members make it.
            own = dist.new_group(members, wait, dist.get_backend(group), use_local_synchronization=True)
            self._reducer = Sharded(own, timeout_s=self._timeout_s)
            self._thread = OrderedThread("evenkeel-gradients", self._reducer.close, self._reducer.close)
        self._registered = True
        _UNUSED.add(self._unused)

    def stats(self) -> HookStats:
        """Gives what compression has cost and saved on this rank so far."""
        return self._meter.stats(self._step, self._compressed_steps, self._reducer.fell_back)

    def close(self) -> None:
        """Ends the communication thread and its connections. The state cannot be used any more."""
        self._thread.close()
        self._reducer.close()
        self._note_use()

    def state_dict(self) -> dict[str, Any]:
        """Gives what a resume needs on this rank, in tensors and plain values: save it per rank, between two steps."""
        if self._begun:
            raise ConfigurationError(
                "state_dict was called within a backward pass, or after one that failed: call it between two steps"
            )
        self._thread.submit(lambda: torch.empty(0), torch.device("cpu")).wait()
        ranks = self._reducer.ranks
        code = {} if self._code is None else self._code.state_dict()
        unwaited = self._unwaited.state_dict()
        return {
            "step": self._step,
            "rank": ranks.rank,
            "world": ranks.world,
            "sizes": list(self._book.sizes or self._sizes_before or []),
            "units": self._units.state_dict(),
            "code": code,
            "unwaited": unwaited,
            "tensors": count_tensors((code, unwaited)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; before the first step, on every rank with its own.

        With another number of ranks, or another rank's state, error feedback starts from nothing, with a warning. A
        rank that is new loads any other rank's state. Missing tensors are warned of too: `torch.distributed.checkpoint`
        fills in only what a state has already, and a new one has none.

        Raises:
            ConfigurationError: it is no state of a HookState, or of one with another code, or malformed; the message
                names the field. Nothing has been loaded then.
        """
        if self._steps_here or self._begun:
            raise ConfigurationError("load_state_dict must be called before the first step")
        check_saved_state(state, "HookState")
        ranks, theirs = self._reducer.ranks, (state["rank"], state["world"])
        feedback, unwaited = self._code if isinstance(self._code, ErrorFeedback) else None, state.get("unwaited", {})
        coded = self._code is not None
        try:
            step, sizes = saved_whole("step", state["step"]), saved_list("sizes", state["sizes"])
            for size in sizes:
                saved_whole("sizes", size)
            saved_whole("rank", state["rank"])
            saved_whole("world", state["world"], state["rank"] + 1)
            saved_whole("tensors", state.get("tensors", 0))
            units, late = Units(), Unwaited()
            units.load_state_dict(state["units"])
            late.load_state_dict(unwaited)
            late.check_sizes(sizes)
            saved = state["code"]
            if not isinstance(saved, Mapping):
                raise CodeError(f"code: the state must have a dictionary here, found {type(saved).__name__}")
            owed = saved.get("memory", {}) if feedback is not None else {}
            units.check_sizes(sizes, saved_numbers("code.memory", owed))
            if self._code is not None:
                self._code.load_state_dict(saved)  # which loads nothing where it refuses something
        except CodeError as error:
            raise ConfigurationError(f"this state cannot be loaded, and nothing of it was: {error}") from error
        moved = (feedback is not None or bool(unwaited)) and (ranks.rank, ranks.world) != theirs
        self._units, self._unwaited, self._step = units, late, step
        self._sizes_before = sizes or None  # none before a first step
        found = count_tensors((state["code"], unwaited))
        lost = warn_of_lost_tensors(state.get("tensors", found), found, "error feedback starts from nothing")
        if feedback is not None and lost:
            feedback.reset()
        if lost:
            self._unwaited.reset()
        if "unwaited" not in state and not self._reducer.waits and coded and state["step"] > self._start_step:
            warnings.warn(
                "the state that was loaded is of an older version, which did not save what biases and norms (and "
                "whatever else skip= names) still owed under a reducer with a deadline: that is lost, and their "
                "error feedback starts from nothing",
                stacklevel=2,
            )
        if moved:
            if feedback is not None:
                feedback.reset()
            self._unwaited.plain_code.reset()
            warnings.warn(
                f"the state of rank {state['rank']} of {state['world']} was loaded by rank {ranks.rank} of "
                f"{ranks.world}: error feedback starts from nothing. The rest is alike on all ranks, so any rank's "
                "state will do for a rank that is new",
                stacklevel=2,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookState":
        make, parts = self._parts()
        copied: HookState = make(*copy.deepcopy(parts, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        check_pickles(skip=self._skip, loss_scale=self.loss_scale)
        self._note_use()  # perhaps by the process that is sent the pickle
        return self._parts()

    def _parts(self) -> tuple[Any, ...]:
        """Gives what copies and pickles are made of: settings and memories, but no thread and no connections."""
        with contextlib.suppress(EvenkeelError):  # closed, or failed: nothing is under way then
            self._thread.submit(lambda: torch.empty(0), torch.device("cpu")).wait()
        settings = {
            "code": self._code,
            "error_feedback": False,  # the code is wrapped already
            "start_step": self._start_step,
            "skip": self._skip,
            "timeout_s": self._timeout_s,
            "loss_scale": self.loss_scale,
            "compare_weights_every": self._compare_every,
        }
        sizes = list(self._book.sizes or self._sizes_before or [])
        return _copy_of, (
            type(self),
            settings,
            self._step,
            sizes,
            self._units,
            self._given or self._lacks,
            self._unwaited,
        )

    def _comparison(self, bucket: Bucket) -> Callable[[], None] | None:
        """Takes the weights' digests, where they are due.

        Now, since the round may run while the optimizer steps; and with a step's last bucket, when even the first step
        has shown all parameters.
        """
        if self._compare_every is None or self._steps_here % self._compare_every:
            return None
        parameters = list(self._book.parameters)
        row = digests([self.shared_weights(parameter) for parameter in parameters])
        takes_part = runs_backward(bucket)
        return lambda: check_same_weights(self._reducer.ranks, row, takes_part, parameters)

    def _round(
        self,
        buffer: Tensor,
        plan: BucketPlan,
        fields: dict[str, object] | None,
        comparison: Callable[[], None] | None,
    ) -> Tensor:
        if fields is not None:
            check_agreement(self._reducer.ranks, fields, buffer.device)
            self._check_world()
        if comparison is not None:
            comparison()
        return average_bucket(buffer, plan, self._code, self._reducer, self._meter, self._unwaited)

    def _plan(self, buffer: Tensor, members: Sequence[int], views: Sequence[Tensor]) -> BucketPlan:
        if not buffer.numel():
            return BucketPlan(self._step, self._scale, [], [], metered=False)
        code = self._code
        if code is None or self._step < self._start_step:
            return BucketPlan(
                self._step, self._scale, [], [buffer], metered=code is not None and self._step >= self._start_step
            )
        by_number = {number: view for number, view in zip(members, views, strict=True) if view.numel()}
        coded = [number for number in by_number if not self._is_skipped(number)]
        units: list[Unit] = []
        if coded:
            covering, given_up = self._units.covering(coded)
            if given_up:
                warnings.warn("DDP has rebuilt its buckets: what the code remembers of them starts anew", stacklevel=2)
                self._unwaited.forget()
            if isinstance(code, ErrorFeedback):
                for number in given_up:
                    code.reset(number)
            for number, unit in covering.items():
                code.arrange(number, [tuple(by_number[member].shape) for member in unit])
                units.append(Unit(number, [by_number[member] for member in unit]))
        if self._compressed_steps == 0:
            self._hint_at_masks([by_number[number] for number in coded])
        skipped = [number for number in by_number if self._is_skipped(number)]
        plain = [by_number[number] for number in skipped]
        covering = {} if self._reducer.waits else self._unwaited.plain_covering(skipped)
        aside = [Unit(number, [by_number[member] for member in unit]) for number, unit in covering.items()]
        return BucketPlan(self._step, self._scale, units, plain, metered=True, aside=aside)

    def _warn_of_zeros(self) -> None:
        """Says in the first step that rows without a gradient are not kept at zero, where the reducer does not wait."""
        if self._code is not None and not self._reducer.waits and self._reducer.ranks.rank == 0:
            _log.warning(
                "the reducer has a deadline, so rows and columns whose gradient is zero on all ranks (padding, words "
                "that do not occur) are not kept at exactly zero as they are otherwise: no rank knows where late ones "
                "have zeros. If they must not move, list the parameters in skip= (what never had a gradient is zero "
                "there), write the zeros again after each step, or leave the deadline out"
            )

    def _hint_at_masks(self, gradients: Sequence[Tensor]) -> None:
        """Says in the first compressed step where single weights may be masked, which no code that mixes them keeps."""
        code = self._code.inner if isinstance(self._code, ErrorFeedback) else self._code
        if isinstance(code, FixedPoint | Plain):
            return
        for gradient in gradients:
            if scattered_zeros(gradient) > _MASKED_SHARE:
                _log.warning(
                    "most of the gradient of a parameter of shape %s is exactly zero, scattered over its rows and "
                    "columns. %r gives these numbers small averages that are not zero: if a mask is to keep them "
                    "still, list the parameter in skip=, or apply the mask after each step",
                    tuple(gradient.shape),
                    code,
                )

    def _is_skipped(self, number: int) -> bool:
        if number not in self._skipped:
            self._skipped[number] = bool(self._skip(self._book.parameters[number]))
        return self._skipped[number]

    def _note_use(self) -> None:
        _UNUSED.discard(self._unused)

    def _end_step(self) -> None:
        if self._steps_here == 0:
            self._note_use()
        self._book.close()
        self._begun = False
        if self._code is not None and self._step >= self._start_step:
            self._compressed_steps += 1
            self._advise()
        self._step += 1
        self._steps_here += 1

    def _advise(self) -> None:
        if self._advised or self._compressed_steps % _STEPS_BETWEEN_ADVICE:
            return
        stats = self.stats()
        if stats.plain_bps > stats.break_even_bps:
            self._advised = True
            warnings.warn(
                "compression costs more than it saves: gradients travelled uncompressed at "
                f"{stats.plain_bps / 1e6:.0f} Mbit/s, and above {stats.break_even_bps / 1e6:.0f} Mbit/s {self._code!r} "
                "is a loss on this machine; train without the hook on this network",
                stacklevel=3,
            )

    def _check_sizes(self, members: Sequence[int]) -> None:
        before, now = self._sizes_before, self._book.sizes
        if before is not None and any(number >= len(before) or before[number] != now[number] for number in members):
            raise ConfigurationError("the state that was loaded belongs to another model: load the one of this model")

    def _check_group(self, parameters: Sequence[Tensor]) -> None:
        """Refuses to average over other ranks than the model's DistributedDataParallel would, where that is known."""
        ranks = self._reducer.ranks
        if not isinstance(ranks, GroupCollectives) or not parameters:
            return
        found = [sorted(dist.get_process_group_ranks(each.process_group)) for _, each in models_of(parameters[0])]
        if found and ranks.members not in found:
            raise ConfigurationError(
                f"this model's gradients belong to ranks {found[0]}, but the state exchanges over {ranks.members}: "
                "evenkeel.register(ddp_model, state) takes the model's own ranks; or give HookState group=, a group of "
                "these ranks that is used for nothing else"
            )

    def _check_world(self) -> None:
        world, top = self._reducer.ranks.world, None if self._code is None else self._code.max_workers
        if top is not None and world > top:
            raise ConfigurationError(
                f"{self._code!r} can add the messages of at most {top} ranks without overflow, but there are {world}: "
                "choose fewer bits or a smaller granularity"
            )

    def _fields(self, parameters: Sequence[Tensor]) -> dict[str, object]:
        shared = self.shared_weights(parameters[0])
        weights = {} if self._compare_every is None else {_WEIGHTS: int(digest(shared))}
        return {
            "evenkeel": __version__,
            "code": self._code,
            "start_step": self._start_step,
            "reducer": type(self._reducer).__name__,
            "loss_scale": "given" if self.loss_scale is not None else "not given",
            "step": self._step,
            "schedule": self.schedule,
            "compare_weights_every": self._compare_every,
            **weights,
            "parameters": [tuple(parameter.shape) for parameter in parameters],
            "skip": [number for number in self._book.numbers(parameters) if self._is_skipped(number)],
        }


# One object for each state that has averaged nothing yet, also for states that are gone.
_UNUSED: set[object] = set()


def _forget_unused_of_launchers() -> None:
    """After a fork: states of a process that is no rank itself were made for its children."""
    if not (dist.is_available() and dist.is_initialized()):
        _UNUSED.clear()


os.register_at_fork(after_in_parent=_forget_unused_of_launchers)


@atexit.register
def _warn_of_unused() -> None:
    if len(_UNUSED) and not hasattr(sys, "last_value"):  # a program that failed has said what is wrong
        warnings.warn(
            f"evenkeel: the hook of {len(_UNUSED)} HookState(s) never ran, so nothing was compressed. Was it "
            "registered, and with the model that was trained? Some frameworks drop it (Lightning does on CPUs): "
            "see docs/how-to/frameworks.md",
            stacklevel=1,
        )


def _copy_of(
    kind: type[HookState],
    settings: dict[str, Any],
    step: int,
    sizes: list[int],
    units: Units,
    lacks: str,
    unwaited: Unwaited | None = None,  # older pickles have none
) -> HookState:
    state = kind(**settings)
    state._note_use()  # a copy need not be trained
    state._step, state._sizes_before, state._units, state._lacks = step, sizes or None, units, lacks
    if unwaited is not None:
        state._unwaited = unwaited
    return state


def _nothing() -> None:
    pass
