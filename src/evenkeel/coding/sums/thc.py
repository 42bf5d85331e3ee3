"""Does what `plain_thc.py` does, with kernels where there are any: the same bits in a fraction of the time."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from evenkeel.coding.sum_code import count_per_granule, flat
from evenkeel.coding.sums.integer_lanes import block_count, check_scales, inverse, usable
from evenkeel.coding.sums.kernels import MAX_WORKERS, Kernels, fast
from evenkeel.coding.sums.kernels.coder import Coder, coder_of
from evenkeel.coding.sums.plain_thc import PlainTHC, TableWire
from evenkeel.coding.sums.rotation import signs_key
from evenkeel.coding.wire import Round, Total

__all__ = ["THC"]


class THC(PlainTHC):
    """Does what `PlainTHC` does, by kernels where there are any.

    Args:
        bits: sent up for each coordinate, 1 to 8.
        granularity: largest number of the table, at least 2**bits - 1.
        p: share of coordinates that are clipped.
        rounding: `correlated`, `stochastic` or `nearest`.
        block: coordinates rotated together, a power of two from 8.
        seed: of all randomness; the same on all ranks.

    Raises:
        ConfigurationError: a setting out of range.
    """

    name: Final = "thc"

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives the same, but for the last bits, which depend on the order of adding."""
        vector = flat(vector)
        kernels = fast(vector)
        if kernels is None:
            return super().measure(vector, this_round)
        return usable(kernels.squares(vector, None, self.granule).sqrt())

    def measure_owed(self, vector: Tensor, memory: Tensor, this_round: Round) -> Tensor:
        """Does the same for vector + memory, without their sum between."""
        vector = flat(vector)
        kernels = fast(vector, memory)
        if kernels is None or memory.shape != vector.shape:
            return super().measure_owed(vector, memory, this_round)
        return usable(kernels.squares(vector, memory, self.granule).sqrt())

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Gives the same, in one pass."""
        vector = flat(vector)
        kernels = self._kernels(this_round, vector, stats)
        if kernels is None:
            return super().encode(vector, stats, this_round)
        check_scales(stats, vector.numel(), self.granule)
        lanes = self.lanes(vector.numel(), this_round)
        return kernels.encode_packed(vector, inverse(stats), lanes, self._coder(this_round))

    def encode_owed(self, vector: Tensor, memory: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Does the same for vector + memory, and leaves the rest in memory, all in one pass."""
        vector = flat(vector)
        kernels = self._kernels(this_round, vector, memory, stats)
        if kernels is None or memory.shape != vector.shape:
            return super().encode_owed(vector, memory, stats, this_round)
        check_scales(stats, vector.numel(), self.granule)
        lanes = self.lanes(vector.numel(), this_round)
        step, _ = self._steps(stats, count_per_granule(1, stats.numel(), this_round, stats.device), lanes)
        return kernels.encode_owed(vector, memory, inverse(stats), step, lanes, self._coder(this_round))

    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Gives the same, from lanes or straight from bytes, in one pass."""
        sums, lanes, wire = total.sums, self.lanes(length, this_round), self.wire(this_round.world)
        kernels = self._kernels(this_round, stats)
        fits = sums.shape == (wire.total_bytes(lanes) if total.packed else lanes,)
        readable = fast(sums, types=(torch.uint8,) if total.packed else (torch.uint8, torch.int32))
        if kernels is None or not fits or not readable or stats.shape != (block_count(length, self.granule),):
            return super().decode(total, stats, length, this_round)
        counts = count_per_granule(total.count, stats.numel(), this_round, sums.device)
        blocks = self.granularity * counts, *self._steps(stats, counts, lanes)
        secret = signs_key(self.seed, this_round)
        if total.packed:
            return kernels.decode_packed(sums, wire.down_width, *blocks, length, self.granule, secret)
        return kernels.decode(sums, *blocks, length, self.granule, secret)

    def wire(self, world: int) -> "_KernelWire":
        """Gives the same bytes and sums."""
        return _KernelWire(self.table, self.granule, world)

    def _kernels(self, this_round: Round, *tensors: Tensor) -> Kernels | None:
        kernels = fast(*tensors)
        fits = kernels is not None and self.granule <= kernels.LARGEST_BLOCK and this_round.world <= MAX_WORKERS
        return kernels if fits else None

    def _coder(self, this_round: Round) -> Coder:
        return coder_of(self.table, self._clip, self.rounding, self.granule, self.seed, this_round)


class _KernelWire(TableWire):
    def unpack(self, message: Tensor, lanes: int) -> Tensor:
        kernels = self._kernels([message], lanes)
        return super().unpack(message, lanes) if kernels is None else self._sums(kernels, [message], lanes)

    def add(self, messages: Sequence[Tensor], lanes: int) -> Tensor:
        """Adds without the messages' lanes between."""
        kernels = self._kernels(messages, lanes)
        return super().add(messages, lanes) if kernels is None else self._sums(kernels, messages, lanes)

    def _sums(self, kernels: Kernels, messages: Sequence[Tensor], lanes: int) -> Tensor:
        return kernels.add_packed(messages, lanes, self.lane_type, self.table)

    def _kernels(self, messages: Sequence[Tensor], lanes: int) -> Kernels | None:
        fits = all(message.shape == (self.message_bytes(lanes),) for message in messages)
        return fast(*messages, types=(torch.uint8,)) if fits else None
