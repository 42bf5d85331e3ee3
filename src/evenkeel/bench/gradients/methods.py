"""Averages gradients in `evenkeel bench gradients`: hooks for DistributedDataParallel by name.

Annotations of hooks must be the objects themselves, not strings: DDP compares them.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from evenkeel.bench.gradients.cells import Method, read_method
from evenkeel.coding.sums.by_name import code_of
from evenkeel.reducers.ranks.ordered_thread import OrderedThread
from evenkeel.reducers.switch import SwitchReducer
from evenkeel.training.hook.buckets import Bucket
from evenkeel.training.hook.ddp_hook import comm_hook
from evenkeel.training.hook.hook_state import HookState
from evenkeel.training.hook.pipe_sgd import PipeSGD

if TYPE_CHECKING:
    GradBucket = Bucket
else:
    from torch.distributed import GradBucket

__all__ = ["Averaging", "average_nothing"]

_TIMEOUT_S = 120.0
_START_STEP = 2  # the first step that a hook may compress, since DDP rebuilds its buckets after the first


class Averaging:
    """Averages the gradients of one DDP model by a method.

    Args:
        name: as `read_method` reads it.
        ddp: whose gradients are averaged.
        optimizer: of the model.
        unpiped_steps: that Pipe-SGD begins with.
        switch: address of the switch, for methods that use one.
    """

    def __init__(
        self, name: str, ddp: Any, optimizer: torch.optim.Optimizer, unpiped_steps: int = 0, switch: str = ""
    ) -> None:
        self._switch = switch
        self._over_switch: SwitchReducer | None = None
        self._pipe: PipeSGD | None = None
        self._casts: _Casts | None = None
        self._state: HookState | None = None
        self._thread: OrderedThread | None = None
        method = read_method(name)
        state, hook = self._hook(method)
        if method.schedule:
            hooks = {} if state is None else {"hook": hook}
            self._pipe = PipeSGD(state, warmup_steps=unpiped_steps, **hooks)
            self._pipe.attach(optimizer, look_ahead=ddp if method.schedule == "pipe-ahead" else None)
            ddp.register_comm_hook(self._pipe, comm_hook)
        elif state is not None:
            ddp.register_comm_hook(state, hook)

    def flush(self) -> bool:
        """Tells whether gradients of the last step still were to be applied; then they are in place now."""
        return self._pipe is not None and self._pipe.flush()

    def costs(self) -> dict[str, Any]:
        """Gives sums of this rank so far: `encode_s`, `add_s`, `decode_s` and bytes by our own counting.

        None is what is not known: PowerSGD's work lies within torch's hook.
        """
        if self._state is not None:
            stats = self._state.stats()
            return {
                "encode_s": stats.encode_s,
                "add_s": stats.add_s,
                "decode_s": stats.decode_s,
                "communicate_s": stats.communicate_s,
                "counted_bytes": stats.sent_bytes,
                "local_nmse": stats.local_nmse,
            }
        if self._casts is not None:
            return {"encode_s": self._casts.encode_s, "add_s": 0.0, "decode_s": self._casts.decode_s}
        return dict.fromkeys(("encode_s", "add_s", "decode_s"), None if self._thread is not None else 0.0)

    def datagram_bytes(self) -> int:
        """Counts what this rank has sent to a switch."""
        return 0 if self._over_switch is None else self._over_switch.stats().transport.sent_bytes

    def switch_costs(self) -> dict[str, Any]:
        """Says what became of the rounds over a switch; nothing for other methods."""
        if self._over_switch is None:
            return {}
        stats = self._over_switch.stats()
        return {
            "through_switch": stats.through_switch,
            "fell_back": stats.over_shares,
            "left_out": stats.left_out,
            "resent_packets": stats.transport.resent,
            "exchange_s": self._over_switch.exchange_s,
            "exchange_bytes": self._over_switch.exchange_bytes,
        }

    def close(self) -> None:
        """Waits for what still travels, and ends the threads."""
        if self._state is not None:
            self._state.close()
        if self._thread is not None:
            self._thread.submit(lambda: torch.empty(0), torch.device("cpu")).wait()
            self._thread.close()

    def _hook(self, method: Method) -> tuple[Any, Any]:
        """Makes a state and its hook; no state for what DDP does by itself."""
        if method.is_sum_code:
            if method.switch is not None:
                self._over_switch = SwitchReducer(self._switch, timeout_s=_TIMEOUT_S, **method.switch)  # type: ignore[arg-type]
            self._state = HookState(
                code_of(method.code),
                error_feedback=method.error_feedback,
                start_step=_START_STEP,
                reducer=self._over_switch,
            )
            return self._state, comm_hook
        if method.code == "fp32":
            return None, None
        if method.code == "bf16":
            self._casts = _Casts()
            return self._casts, bf16_hook
        self._thread = OrderedThread("powersgd", lambda: None)
        return _PowerSGD(int(method.code.removeprefix("powersgd:rank=")), self._thread), powersgd_in_order


def average_nothing(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Gives the bucket as it is: a step with it is one without communication."""
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


class _Casts:
    """Holds what `bf16_hook` needs and measures: a group of its own, as Pipe-SGD needs, and the time of casts."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group()
        self.encode_s = self.decode_s = 0.0


def bf16_hook(state: _Casts, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages gradients that travel, and are added, in bfloat16.

    As torch's own `bf16_compress_hook`, which refuses every backend but NCCL; Gloo adds bfloat16 as well.
    """
    values = bucket.buffer()
    begin = time.perf_counter()
    sent = values.to(torch.bfloat16).div_(dist.get_world_size())
    state.encode_s += time.perf_counter() - begin

    def back(done: "Future[Any]") -> Tensor:
        begin = time.perf_counter()
        values.copy_(done.value()[0])
        state.decode_s += time.perf_counter() - begin
        return values

    future: Future[Tensor] = dist.all_reduce(sent, group=state.group, async_op=True).get_future().then(back)
    return future


class _PowerSGD:
    """Holds torch's PowerSGD with its usual settings, but compressing from the first possible step on.

    Its hook starts further all-reduces from callbacks, which Gloo runs in several threads: with two buckets their order
    may differ between ranks. So each bucket's round runs in one thread, from its first all-reduce to its last.
    """

    def __init__(self, rank: int, thread: OrderedThread) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        self.thread = thread
        self.hook = powerSGD_hook
        self.state = PowerSGDState(dist.new_group(), matrix_approximation_rank=rank, start_powerSGD_iter=_START_STEP)


def powersgd_in_order(state: _PowerSGD, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket by torch's PowerSGD hook in its thread."""

    def job() -> Tensor:
        with torch.no_grad():
            average: Tensor = state.hook(state.state, bucket).wait()
            return average

    return state.thread.submit(job, bucket.buffer().device)
