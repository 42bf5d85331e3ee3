"""Keeps what a code loses of a gradient, and adds it to the next one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from evenkeel.coding.saved_state import saved_numbers, saved_tensor
from evenkeel.coding.sum_code import UNUSED_BUCKET, Broadcast, SumCode, are_finite, flat
from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["ErrorFeedback"]


class ErrorFeedback(SumCode):
    """Gives another code a memory for each bucket: sends vector + memory, and keeps what the message does not say.

    Over time the sums miss nothing: what was decoded and what is in memory add up to all vectors given. A round in
    which some rank's vector is not finite leaves every memory as it was. What `dropped` says was left out of the sum
    goes back into memory whole.

    Args:
        code: what codes vector + memory. Shared by nobody else if it keeps a state of its own.

    Attributes:
        inner: the code.
    """

    name: Final = "error_feedback"

    def __init__(self, code: SumCode) -> None:
        if isinstance(code, ErrorFeedback):
            raise CodeError("error feedback around error feedback has nothing to remember: wrap once")
        if not isinstance(code, SumCode):
            raise ConfigurationError(f"code: must be a sum code such as THC(bits=4), found {code!r}")
        self.inner = code
        self.granule = code.granule
        self.max_workers = code.max_workers
        self._memory: dict[int, Tensor] = {}
        self._sent: dict[int, _Sent] = {}

    def __repr__(self) -> str:
        return f"ErrorFeedback({self.inner!r})"

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives whether vector + memory is finite (0 or infinity), then what the code measures of it."""
        vector = flat(vector)
        memory = self._memory_of(vector, this_round)
        stats = self.inner.measure_owed(vector, memory, this_round)
        finite = are_finite(stats if stats.numel() else vector + memory)
        return torch.cat((torch.where(finite, 0.0, torch.inf).to(torch.float32).view(1), stats))

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Gives the code's message for vector + memory; it is kept in case it is lost.

        The memory becomes what the message does not say of vector + memory.
        """
        vector = flat(vector)
        memory = self._memory_of(vector, this_round)
        if bool(stats[0].isfinite()):
            message = self.inner.encode_owed(vector, memory, stats[1:], this_round)
        else:
            message = self.inner.encode(vector + memory, stats[1:], this_round)
        self._memory[this_round.bucket] = memory
        self._sent[this_round.bucket] = _Sent(this_round, message, stats, vector.numel())
        return message

    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Decodes with the code."""
        return self.inner.decode(total, stats[1:], length, this_round)

    def lanes(self, length: int, this_round: Round) -> int:
        """Asks the code."""
        return self.inner.lanes(length, this_round)

    def wire(self, world: int) -> Wire:
        """Asks the code."""
        return self.inner.wire(world)

    def dropped(self, this_round: Round, lost: Tensor | None = None) -> None:
        """Puts back into memory what the last message of the bucket said, where it was lost. Once for each message.

        Raises:
            CodeError: the last message was of another round, or has been reported already.
        """
        sent = self._sent.pop(this_round.bucket, None)
        if sent is None or sent.this_round != this_round:
            raise CodeError(
                f"{this_round} has no message that could be lost: report each loss once, before the bucket's next round"
            )
        lanes = self.inner.lanes(sent.length, this_round)
        message = self.inner.wire(this_round.world).unpack(sent.message, lanes)
        alone = Total(message, count=1 if lost is None else lost.int())
        decoded = self.inner.decode(alone, sent.stats[1:], sent.length, this_round)
        decoded = torch.where(sent.stats[0].isfinite(), decoded, 0.0)  # otherwise nothing was taken out of memory
        self._memory[this_round.bucket] = self._memory[this_round.bucket] + decoded

    def memory(self, bucket: int) -> Tensor | None:
        """Gives what is owed in `bucket`, `[length]`, until its next round changes it; None before its first round."""
        return self._memory.get(bucket)

    def reset(self, bucket: int | None = None) -> None:
        """Forgets what is owed in `bucket`, or in all: after buckets were rebuilt, or with another world size."""
        for memory in (self._memory, self._sent):
            if bucket is None:
                memory.clear()
            else:
                memory.pop(bucket, None)

    def state_dict(self) -> dict[str, Any]:
        """Gives the memories by bucket, and the code's own state."""
        memory = {bucket: memory.clone() for bucket, memory in self._memory.items()}
        return {"memory": memory, "code": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over memories and the code's state.

        Raises:
            CodeError: it is the state of another code.
        """
        if not isinstance(state, Mapping):
            raise CodeError(f"the state of error feedback is a dictionary, found {type(state).__name__}")
        if set(state) != {"memory", "code"}:
            raise CodeError(f"the state of error feedback holds memory and code, found {sorted(map(str, state))}")
        memory = {
            bucket: saved_tensor(f"memory[{bucket}]", owed, (None,)).to(torch.float32, copy=True)
            for bucket, owed in saved_numbers("memory", state["memory"]).items()
        }
        self.inner.load_state_dict(state["code"])  # which loads nothing where it refuses something
        self._memory = memory
        self._sent = {}

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Passes this on to the code."""
        self.inner.arrange(bucket, shapes)

    def prepare(self, world: int, device: torch.device) -> None:
        """Passes this on to the code, and forgets the memory that it made."""
        super().prepare(world, device)
        self.reset(UNUSED_BUCKET)

    def observe(self, mean: Tensor, this_round: Round, broadcast: Broadcast) -> None:
        """Passes this on to the code."""
        self.inner.observe(mean, this_round, broadcast)

    def _memory_of(self, vector: Tensor, this_round: Round) -> Tensor:
        memory = self._memory.get(this_round.bucket)
        if memory is None:
            return torch.zeros_like(vector)
        if memory.shape != vector.shape:
            raise CodeError(
                f"bucket {this_round.bucket} has {vector.numel()} coordinates, but its memory has {memory.numel()}: "
                f"if the buckets were rebuilt, call reset({this_round.bucket})"
            )
        return memory.to(vector.device)


@dataclass(frozen=True, slots=True)
class _Sent:
    """Keeps the last message of a bucket until the next one, in case it is lost."""

    this_round: Round
    message: Tensor
    stats: Tensor
    length: int
