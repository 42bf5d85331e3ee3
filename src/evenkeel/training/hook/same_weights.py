"""Compares the ranks' weights by digests: ranks that drift apart would train on without a word."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.training.hook.buckets import models_of

__all__ = ["check_same_weights", "digest", "digests"]

_ROW = 1 << 14
_PIECE = 1 << 22
_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def digest(weights: Tensor) -> Tensor:
    """Hashes the bits of a tensor to one int32: other bits at any place give another one, but for a chance of 2**-32.

    The sum of 32-bit words, each times an odd random number, modulo 2**32: it needs one pass, and is exact on every
    device. Rows of words are summed first, then their sums.
    """
    real = torch.view_as_real(weights.detach()) if weights.is_complex() else weights.detach()
    words, level = real.reshape(-1).view(_OF_SIZE[real.element_size()]), 0
    while level == 0 or words.numel() > 1:
        factors = _factors(level, words.device)
        # Piece by piece, for the sake of memory.
        words = torch.cat([_row_sums(piece.to(torch.int32), factors) for piece in torch.split(words, _PIECE)])
        level += 1
    return words


def digests(parameters: Sequence[Tensor]) -> Tensor:
    """Gives the digest of each parameter, int32 `[parameters]` on the first one's device."""
    with torch.no_grad():
        return torch.cat([digest(each).to(parameters[0].device) for each in parameters])


def check_same_weights(ranks: Collectives, row: Tensor, takes_part: bool, parameters: Sequence[Tensor]) -> None:
    """Compares all ranks' digests, in one small exchange.

    Args:
        ranks: that should have the same weights.
        row: this rank's `digests` of `parameters`.
        takes_part: false on a rank that has run out of inputs (`join`) and keeps the others company with old weights.
        parameters: in the same order on all ranks.

    Raises:
        ConfigurationError: on every rank, naming the first parameter that differs, and on which ranks.
        ReducerError: a peer is gone or silent.
    """
    rows = torch.stack(ranks.gather(torch.cat([row, row.new_full((1,), takes_part)]))).cpu()
    present = rows[:, -1].nonzero().flatten().tolist()
    differing = (rows[present, :-1] != rows[present[:1], :-1]).any(0).nonzero().flatten().tolist()
    if not differing:
        return
    holders: dict[int, list[int]] = {}
    for rank in present:
        holders.setdefault(int(rows[rank, differing[0]]), []).append(rank)
    common, *others = sorted(holders.values(), key=len, reverse=True)
    odd = sorted(rank for each in others for rank in each)
    more = f", and so do {len(differing) - 1} more" if len(differing) > 1 else ""
    raise ConfigurationError(
        f"the ranks' weights have drifted apart: {described(parameters[differing[0]])} differs on rank{_s(odd)} {odd} "
        f"from rank{_s(common)} {common}{more}; the ranks started from different weights, or something changes weights "
        "on single ranks. Where they are meant to differ within a step, as in SAM, give HookState "
        "compare_weights_every=None"
    )


def described(parameter: Tensor) -> str:
    """Names a parameter as its DistributedDataParallel does, if there is one."""
    shape = f"of shape {tuple(parameter.shape)}"
    for name, _ in models_of(parameter):
        return f"parameter {name} {shape}"
    return f"a parameter {shape}"


def _row_sums(words: Tensor, factors: Tensor) -> Tensor:
    whole = words.numel() // _ROW * _ROW
    rows, rest = words[:whole].view(-1, _ROW), words[whole:]
    # A product with a matrix needs no memory for the single products, but GPUs have none of whole numbers.
    sums = torch.mv(rows, factors) if words.device.type == "cpu" else (rows * factors).sum(1, dtype=torch.int32)
    if rest.numel() or not whole:
        sums = torch.cat([sums, (rest * factors[: rest.numel()]).sum(dtype=torch.int32).view(1)])
    return sums


@lru_cache(maxsize=16)
def _factors(level: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(level)
    drawn = torch.randint(-(2**31), 2**31, (_ROW,), generator=generator, dtype=torch.int64, device="cpu")
    return (drawn | 1).to(torch.int32).to(device)


def _s(ranks: Sequence[int]) -> str:
    return "s" * (len(ranks) > 1)
