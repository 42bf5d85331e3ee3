"""Estimates what a whole gradient costs with each code: bytes on the wire, time to encode and to decode.

Codes are named as in `coding/sums/by_name.py`, so that what is advised can be tried in the benches.

The times are assumed figures of one core, in nanoseconds a parameter; give measured ones where there are any.
"""

import math
from collections.abc import Sequence

from evenkeel.errors import ConfigurationError
from evenkeel.training.plan.timing import CodeCost, require_time

__all__ = ["bf16", "gradiveq", "low_rank", "power_sgd", "thc"]

_NORM_BITS = 32 / 4096  # a float's share of THC's blocks
_SHORT_NORM_BITS = 32 / 512


def bf16(parameters: int, encode_ns: float = 0.5, decode_ns: float = 0.5) -> CodeCost:
    """Estimates half of each number; times are nanoseconds a parameter."""
    size = 2.0 * parameters
    return CodeCost("bf16", size, size, size, *_times(parameters, encode_ns, decode_ns), harm=1)


def thc(
    parameters: int,
    workers: int,
    bits: int = 4,
    granularity: int = 17,
    encode_ns: float = 6.0,
    decode_ns: float = 5.0,
) -> CodeCost:
    """Estimates table indices of `bits` up, packed sums down, and a norm for each block both ways.

    A sum of `workers` table values, each up to `granularity`, needs ceil(log2(granularity * workers + 1)) bits.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits: must be 1 to 8, found {bits}")
    return CodeCost(
        f"thc:bits={bits}",
        *_thc_bytes(parameters, workers, bits, granularity, _NORM_BITS),
        *_times(parameters, encode_ns, decode_ns),
        collectives=2,
        harm=2,
    )


def gradiveq(
    parameters: int,
    convolutions: int,
    ratio: float = 8.0,
    encode_ns: float = 4.0,
    decode_ns: float = 4.0,
) -> CodeCost:
    """Estimates `ratio` times fewer numbers for the parameters of convolutions, plain numbers for all others.

    Sampling phases are not in it: give the effective ratio, phases included.
    """
    if not 1 <= ratio < math.inf:
        raise ConfigurationError(f"ratio: must be 1 or more, found {ratio:g}")
    if not 0 <= convolutions <= parameters:
        raise ConfigurationError(f"convolutions: must be 0 to {parameters} (all parameters), found {convolutions}")
    size = 4.0 * (convolutions / ratio + parameters - convolutions)
    return CodeCost(f"gradiveq:ratio={ratio:g}", size, size, size, *_times(convolutions, encode_ns, decode_ns), harm=3)


def low_rank(
    parameters: int,
    workers: int,
    matrices: Sequence[tuple[int, int]],
    rank: int = 16,
    bits: int = 4,
    granularity: int = 17,
    encode_ns: float | None = None,
    decode_ns: float | None = None,
) -> CodeCost:
    """Estimates rank (m + k) / 2 numbers, on average of two steps, for each m x k matrix that this at least halves.

    Those numbers and all others travel through THC in blocks of 512. Times are nanoseconds a parameter.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits: must be 1 to 8, found {bits}")
    _check_matrices(parameters, matrices, rank)
    squeezed = [(m, k) for m, k in matrices if rank < min(m, k) and rank * (m + k) <= m * k]
    kept = sum(m * k - rank * (m + k) / 2 for m, k in squeezed)
    encode_ns = 2.0 + 0.02 * rank if encode_ns is None else encode_ns
    decode_ns = 1.0 + 0.03 * rank if decode_ns is None else decode_ns
    return CodeCost(
        f"lowrank:rank={rank}+thc:{'' if bits == 4 else f'bits={bits},'}block=512",
        *_thc_bytes(parameters - kept, workers, bits, granularity, _SHORT_NORM_BITS),
        *_times(parameters, encode_ns, decode_ns),
        collectives=2,
        harm=3,
    )


def power_sgd(
    parameters: int,
    matrices: Sequence[tuple[int, int]],
    rank: int = 1,
    encode_ns: float | None = None,
    decode_ns: float | None = None,
) -> CodeCost:
    """Estimates rank (m + k) numbers for each m x k matrix that this at least halves, plain numbers for the rest.

    Two sums, the second only after the first. Times are nanoseconds a parameter in a compressed matrix.
    """
    _check_matrices(parameters, matrices, rank)
    squeezed = [(rows, columns) for rows, columns in matrices if 2 * rank * (rows + columns) <= rows * columns]
    inside = sum(rows * columns for rows, columns in squeezed)
    size = 4.0 * (sum(rank * (rows + columns) for rows, columns in squeezed) + parameters - inside)
    encode_ns = 2.0 + 0.5 * rank if encode_ns is None else encode_ns
    decode_ns = 1.0 + 0.25 * rank if decode_ns is None else decode_ns
    times = _times(inside, encode_ns, decode_ns)
    return CodeCost(f"powersgd:rank={rank}", size, size, size, *times, collectives=2, harm=3, pipelines=False)


def _thc_bytes(
    numbers: float, workers: int, bits: int, granularity: int, norm_bits: float
) -> tuple[float, float, float]:
    """Gives bytes up, down, and as they are added."""
    sum_bits = (granularity * workers).bit_length()
    return numbers * (bits + norm_bits) / 8, numbers * (sum_bits + norm_bits) / 8, 4.0 * numbers


def _check_matrices(parameters: int, matrices: Sequence[tuple[int, int]], rank: int) -> None:
    if rank < 1:
        raise ConfigurationError(f"rank: must be 1 or more, found {rank}")
    whole = sum(rows * columns for rows, columns in matrices)
    if whole > parameters:
        raise ConfigurationError(f"matrices: hold {whole} numbers, more than the {parameters} parameters")


def _times(coordinates: int, encode_ns: float, decode_ns: float) -> tuple[float, float]:
    require_time("encode_ns", encode_ns)
    require_time("decode_ns", decode_ns)
    return coordinates * encode_ns * 1e-9, coordinates * decode_ns * 1e-9
