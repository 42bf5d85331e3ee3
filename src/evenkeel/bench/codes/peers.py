"""Averages gradients as others do: one round of each method, small and readable, beside our own codes.

Every function takes one round's vectors and a seed, and gives the error of the mean and the bits that it took. None has
error feedback. Where a paper leaves the wire form open, whole bits a number are counted, and float32 scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, log2, prod, sqrt
from typing import Final, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from evenkeel.bench.codes.lloyd_max import lloyd_max
from evenkeel.bench.codes.traffic import Traffic, gathered, ring, sharded
from evenkeel.bench.codes.vectors import Gradients
from evenkeel.coding.sums.counter_hash import counters, key, mix, uniform
from evenkeel.coding.sums.integer_lanes import block_count, inverse, spread
from evenkeel.coding.sums.rotation import padded_length, rotate, rotate_back
from evenkeel.coding.sums.thc_table import clip

__all__ = [
    "MeasuredCode",
    "bf16",
    "drive",
    "eden",
    "fp8",
    "fp32",
    "lloyd_max_limit",
    "power_sgd",
    "qsgd",
    "tern_grad",
    "thc_public",
]

_NUMBER = 32  # bits
_E4M3_LARGEST = 448.0
# tables/ of the THC authors' repository (SophiaLi06/BytePS_THC), for 4 bits, granularity 30, p = 1/32.
_PUBLIC_TABLE: Final = (0, 3, 5, 7, 9, 11, 13, 14, 16, 17, 19, 21, 23, 25, 27, 30)
_PUBLIC_BLOCK: Final = 1024
_PUBLIC_P: Final = 1 / 32


@dataclass(frozen=True, slots=True)
class MeasuredCode:
    """Holds the squared error of the mean as a share of the mean's squared norm, and what was sent for it."""

    nmse: float
    traffic: Traffic

    @classmethod
    def of(cls, mean: Tensor, gradients: Gradients, traffic: Traffic) -> Self:
        """Measures what a mean that was found is off by."""
        true = gradients.vectors.double().mean(0)
        return cls(float((mean.double() - true).square().sum() / true.square().sum()), traffic)


def fp32(gradients: Gradients, seed: int) -> MeasuredCode:
    """Adds the numbers as they are, in a ring all-reduce."""
    total = _added(list(gradients.vectors))
    return MeasuredCode.of(total / gradients.workers, gradients, ring(gradients.workers, _NUMBER * gradients.length))


def bf16(gradients: Gradients, seed: int) -> MeasuredCode:
    """Adds bfloat16 in a ring all-reduce that rounds at each hop, as PyTorch's `bf16_compress_hook`: divided before."""
    total = _added([vector.bfloat16() / gradients.workers for vector in gradients.vectors])
    return MeasuredCode.of(total, gradients, ring(gradients.workers, 16 * gradients.length))


def fp8(gradients: Gradients, seed: int, *, block: int = 128) -> MeasuredCode:
    """Sends E4M3 numbers with a float32 scale for each block, encoded once more on the way back.

    As torchft's `allreduce_quantized` does: all-to-all, sums in float32, all-gather. Source of the form: Micikevicius
    et al., "FP8 Formats for Deep Learning" (2022).
    """

    def coded(vector: Tensor) -> Tensor:
        blocks = _blocks(vector, block)
        scales = blocks.abs().amax(1, keepdim=True) / _E4M3_LARGEST
        shares = (blocks * inverse(scales)).to(torch.float8_e4m3fn).float()
        return (shares * scales).view(-1)[: vector.numel()]

    mean = coded(torch.stack([coded(vector) for vector in gradients.vectors]).mean(0))
    bits = 8 * gradients.length + _NUMBER * block_count(gradients.length, block)
    return MeasuredCode.of(mean, gradients, sharded(gradients.workers, bits, bits, topology="requantised"))


def qsgd(
    gradients: Gradients,
    seed: int,
    *,
    levels: int,
    norm: Literal["largest", "euclidean"] = "largest",
    bucket: int = 512,
    coder: Literal["plain", "entropy"] = "plain",
) -> MeasuredCode:
    """Sends sign and level 0..`levels` of |x| / norm of the bucket, rounded at random without bias.

    The theory has the Euclidean norm, the experiments the largest |x|. `plain` packs into whole bits, enough for
    2 levels + 1 numbers; `entropy` counts what a perfect coder would need, which is less than the paper's Elias code.
    Source: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding" (NeurIPS 2017).
    """
    decoded, bits = [], 0.0
    for rank, vector in enumerate(gradients.vectors):
        blocks = _blocks(vector, bucket)
        norms = (blocks.norm(dim=1) if norm == "euclidean" else blocks.abs().amax(1))[:, None]
        shares = blocks.abs() * inverse(norms) * levels
        numbers = blocks.sign() * (shares + _noise(blocks.numel(), seed, rank).view_as(blocks)).floor()
        decoded.append((numbers * norms / levels).view(-1)[: vector.numel()])
        sent = numbers.view(-1)[: vector.numel()]
        width = ceil(log2(2 * levels + 1)) if coder == "plain" else _entropy(sent)
        bits += (width * vector.numel() + _NUMBER * len(blocks)) / gradients.workers
    return _not_added(decoded, bits, gradients)


def tern_grad(
    gradients: Gradients, seed: int, *, scale: Literal["own", "shared"] = "own", clipped: float = 2.5
) -> MeasuredCode:
    """Sends -1, 0 or 1 times the layer's largest |x|, rounded at random, after clipping at `clipped` deviations.

    A deviation is the root of the mean square.

    With a scale that is `shared` (the largest over the workers) ternary numbers can be added. 2 bits a number. Source:
    Wen, Xu, Yan, Wu, Wang, Chen, Li, "TernGrad" (NeurIPS 2017); clipping is its section 4.
    """
    sizes = [prod(shape) for shape in gradients.shapes] or [gradients.length]
    layers = [[_clipped(layer, clipped) for layer in vector.split(sizes)] for vector in gradients.vectors]
    scales = torch.stack([torch.stack([layer.abs().max() for layer in own]) for own in layers])
    if scale == "shared":
        scales = scales.amax(0).expand_as(scales)
    decoded = []
    for rank, own in enumerate(layers):
        of_each = scales[rank].repeat_interleave(torch.tensor(sizes))
        shares = torch.cat(own) * inverse(of_each)
        decoded.append(shares.sign() * (_noise(gradients.length, seed, rank) < shares.abs()) * of_each)
    if scale == "own":
        return _not_added(decoded, 2 * gradients.length + _NUMBER * len(sizes), gradients)
    sum_bits = (2 * gradients.workers).bit_length()
    traffic = sharded(gradients.workers, 2 * gradients.length, sum_bits * gradients.length, len(sizes))
    return MeasuredCode.of(torch.stack(decoded).mean(0), gradients, traffic)


def eden(gradients: Gradients, seed: int, *, bits: int, block: int = 4096, requantise: bool = False) -> MeasuredCode:
    """Rotates blocks, each rank's in its own way, and rounds them to Lloyd-Max levels, scaled so that there is no bias.

    With one bit it is DRIVE. With `requantise` the owners of shares send the means on in the same form: no fewer bits
    than the all-gather's for two workers, half as many for four, and never 2 `bits` or more; the price is a second
    error.

    Source: Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "EDEN" (ICML 2022); "DRIVE" (NeurIPS
    2021). One scale for each block, as our codes have.
    """
    levels = lloyd_max(bits)[0]
    code = partial(_rotated_and_rounded, levels=levels, block=block, unbiased=True)
    decoded = [code(vector, secret=key(seed, rank)) for rank, vector in enumerate(gradients.vectors)]
    message = _rotated_bits(gradients.length, bits, block)
    if not requantise:
        return _not_added(decoded, message, gradients)
    mean = code(torch.stack(decoded).mean(0), secret=key(seed, gradients.workers))
    return MeasuredCode.of(mean, gradients, sharded(gradients.workers, message, message, topology="requantised"))


def drive(gradients: Gradients, seed: int, *, block: int = 4096) -> MeasuredCode:
    """Sends signs of rotated blocks at DRIVE's other scale: with the least error of each vector, but with a bias."""
    decoded = [
        _rotated_and_rounded(vector, levels=(-1.0, 1.0), block=block, unbiased=False, secret=key(seed, rank))
        for rank, vector in enumerate(gradients.vectors)
    ]
    return _not_added(decoded, _rotated_bits(gradients.length, 1, block), gradients)


def lloyd_max_limit(gradients: Gradients, seed: int, *, bits: int) -> MeasuredCode:
    """Gives D / (1 - D), the error of EDEN on endless vectors without scales: no code, a line to read the others by."""
    _, error = lloyd_max(bits)
    true = gradients.vectors.double().mean(0)
    norms = gradients.vectors.double().square().sum()
    nmse = error / (1 - error) * float(norms / gradients.workers**2 / true.square().sum())
    return MeasuredCode(nmse, gathered(gradients.workers, bits * gradients.length, gradients.length))


def power_sgd(gradients: Gradients, seed: int, *, rank: int) -> MeasuredCode | None:
    """Takes one step of power iteration for each matrix, from the round before; two ring all-reduces of factors.

    What is no matrix, or is not made at least twice smaller, travels as it is. None where nothing is. Source: Vogels,
    Karimireddy, Jaggi, "PowerSGD" (NeurIPS 2019); the rule of what is compressed is PyTorch's.
    """
    mean = gradients.vectors.mean(0)
    chance = torch.Generator().manual_seed(key(seed, rank))
    found, start, saved = mean.clone(), 0, 0
    for shape in gradients.shapes:
        size = prod(shape)
        place = slice(start, start + size)
        start += size
        rows = shape[0] if len(shape) > 1 else 0
        if not rows or 2 * rank * (rows + size // rows) > size:
            continue
        right = torch.randn(size // rows, rank, generator=chance)
        # Factors of all workers are summed, and products are linear in the gradient: so factors of the mean.
        for matrix in (*gradients.earlier[:, place].reshape(-1, rows, size // rows), mean[place].view(rows, -1)):
            left = torch.linalg.qr(matrix @ right)[0]
            right = matrix.T @ left
        found[place] = (left @ right.T).reshape(-1)
        saved += size - rank * (rows + size // rows)
    if not saved:
        return None
    return MeasuredCode.of(found, gradients, ring(gradients.workers, _NUMBER * (gradients.length - saved)))


def thc_public(
    gradients: Gradients,
    seed: int,
    *,
    noise: Literal["shared", "private"] = "shared",
    norm: Literal["whole", "block"] = "whole",
) -> MeasuredCode:
    """Does THC as its authors' public code does: 4 bits up, whole bytes down. Written from reading it, not run.

    Two things there cost accuracy. The noise of the rounding comes from a generator that is never seeded, so all ranks
    round alike (`noise`). The rotation mixes blocks of 1024, while the range comes from the norm of the whole slice
    (`norm`; that part is inferred, as their kernel is not in the repository). Left out in its favour: a second rounding
    to a grid of 1001 points, and padding beyond whole blocks. Source: SophiaLi06/BytePS_THC, byteps/torch.
    """
    vectors = [_blocks(vector, _PUBLIC_BLOCK) for vector in gradients.vectors]
    lanes = vectors[0].numel()
    if norm == "block":
        largest = torch.stack([blocks.norm(dim=1) for blocks in vectors]).amax(0)
    else:
        whole = max(float(blocks.norm()) for blocks in vectors)
        largest = torch.full((lanes // _PUBLIC_BLOCK,), whole / sqrt(lanes / _PUBLIC_BLOCK))
    signs_secret, top, reach = 42, _PUBLIC_TABLE[-1], clip(_PUBLIC_P)
    table = torch.tensor(_PUBLIC_TABLE, dtype=torch.float32)
    scales = spread(largest, lanes, _PUBLIC_BLOCK)
    total = torch.zeros(lanes)
    for rank, blocks in enumerate(vectors):
        normal = rotate(blocks.view(-1), _PUBLIC_BLOCK, signs_secret) * inverse(scales)
        position = (normal.clamp(-reach, reach) + reach) * (top / (2 * reach))
        below = (torch.bucketize(position, table, right=True) - 1).clamp(0, len(table) - 2)
        gap = table[below + 1] - table[below]
        up = position - table[below] > gap * _noise(lanes, seed, 0 if noise == "shared" else rank)
        total += table[below + up.long()]
    rotated = (total / gradients.workers - top / 2) * (2 * reach / top) * scales
    mean = rotate_back(rotated, _PUBLIC_BLOCK, signs_secret)[: gradients.length] / _PUBLIC_BLOCK
    sum_bits = 8 if top * gradients.workers <= 255 else 16
    norms = 1 if norm == "whole" else len(largest)
    return MeasuredCode.of(mean, gradients, sharded(gradients.workers, 4 * lanes, sum_bits * lanes, norms))


def _rotated_and_rounded(vector: Tensor, *, levels: Sequence[float], block: int, unbiased: bool, secret: int) -> Tensor:
    """Gives S R^-1 Q(R x) for each block x; S = |x|^2 / <R x, Q> has no bias, S = <R x, Q> / |Q|^2 the least error."""
    lanes = padded_length(vector.numel(), block)
    padded = pad(vector, (0, lanes - vector.numel()))
    norms = _blocks(padded, block).norm(dim=1)
    # sqrt(size) R x / |x|: near N(0, 1).
    normal = rotate(padded, block, secret) * spread(inverse(norms), lanes, block)
    table = torch.tensor(levels)
    chosen = table[torch.bucketize(normal, (table[1:] + table[:-1]) / 2)]
    along = _blocks(normal * chosen, block).sum(1)
    if unbiased:
        scales = norms * inverse(along)
    else:
        sizes = _blocks(torch.ones(lanes), block).sum(1)
        scales = norms * along * inverse(sizes * _blocks(chosen.square(), block).sum(1))
    return rotate_back(chosen * spread(scales, lanes, block), block, secret)[: vector.numel()]


def _rotated_bits(length: int, bits: int, block: int) -> float:
    return bits * padded_length(length, block) + _NUMBER * block_count(length, block)


def _not_added(decoded: Sequence[Tensor], message_bits: float, gradients: Gradients) -> MeasuredCode:
    traffic = gathered(gradients.workers, message_bits, gradients.length)
    return MeasuredCode.of(torch.stack(list(decoded)).mean(0), gradients, traffic)


def _added(vectors: Sequence[Tensor]) -> Tensor:
    """Adds one vector after the other in the vectors' own type, as on a ring."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total = total + vector
    return total


def _blocks(vector: Tensor, block: int) -> Tensor:
    """Gives the vector as `[blocks, block]`, with zeros at the end."""
    return pad(vector, (0, -vector.numel() % block)).view(-1, block)


def _noise(length: int, seed: int, rank: int) -> Tensor:
    """Draws numbers uniform in [0, 1)."""
    return uniform(mix(counters(length, torch.device("cpu")) + key(seed, rank) & 0xFFFFFFFF))


def _clipped(layer: Tensor, deviations: float) -> Tensor:
    # Around zero, as gradients are: a layer of one number deviates from its own mean by nothing.
    bound = deviations * float(layer.square().mean().sqrt())
    return layer.clamp(-bound, bound)


def _entropy(numbers: Tensor) -> float:
    """Counts the bits a number of an ideal coder that knows how often each number occurs."""
    counts = (numbers - numbers.min()).long().bincount()
    shares = counts[counts > 0].double() / numbers.numel()
    return float(-(shares * shares.log2()).sum())
