"""Plays parts of a sum code's round."""

from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.wire import Round

__all__ = ["lanes_of"]


def lanes_of(code: SumCode, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
    """The lanes of the message that a vector is encoded to."""
    message = code.encode(vector, stats, this_round)
    return code.wire(this_round.world).unpack(message, code.lanes(vector.numel(), this_round))
