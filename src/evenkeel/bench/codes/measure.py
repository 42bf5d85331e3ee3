"""The error of the mean against the bits that it takes, for sum codes and their peers, on the same vectors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor

from evenkeel.bench.codes.peers import (
    MeasuredCode,
    bf16,
    drive,
    eden,
    fp8,
    fp32,
    lloyd_max_limit,
    power_sgd,
    qsgd,
    tern_grad,
    thc_public,
)
from evenkeel.bench.codes.recorded import Recorded
from evenkeel.bench.codes.traffic import Traffic, sharded
from evenkeel.bench.codes.vectors import Gradients, check_made, correlation_of, made
from evenkeel.coding.sum_code import Broadcast, SumCode
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.low_rank import LowRank
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError
from evenkeel.figures.estimates import mean
from evenkeel.text_values import read_count, split_spec, unknown

__all__ = ["DEFAULT_CODES", "CodeContender", "Setting", "made_setting", "measure", "parse_code", "recorded_settings"]

MeasureCode = Callable[[Gradients, int], MeasuredCode | None]

DEFAULT_CODES = (
    "fp32",
    "bf16",
    "fp8",
    "fixed:bits=4",
    "fixed:bits=8",
    *(f"thc:bits={bits}" for bits in range(1, 9)),
    *(f"thc:bits={bits},rounding={rounding}" for rounding in ("stochastic", "nearest") for bits in (2, 4)),
    *(f"thc:bits=4,granularity=30,p=1/32,rounding={rounding}" for rounding in ("correlated", "stochastic")),
    "thc-public",
    "thc-public:norm=block",
    "gradiveq",
    "gradiveq:inner=thc",
    "lowrank:rank=4",
    "lowrank:rank=16,inner=thc",
    "powersgd:rank=1",
    "powersgd:rank=4",
    *(f"qsgd:levels={levels}" for levels in (1, 3, 7, 127)),
    "qsgd:levels=1,norm=euclidean,coder=entropy",
    "terngrad:scale=own",
    "terngrad:scale=shared",
    "drive",
    *(f"eden:bits={bits}" for bits in (1, 2, 4)),
    *(f"eden:bits={bits},requantise=yes" for bits in (3, 4, 5)),
    *(f"lloyd-max:bits={bits}" for bits in range(1, 6)),
)


@dataclass(frozen=True)
class CodeContender:
    """What is measured: the text that names it, and one round of it. A round gives None where it does not apply."""

    code: str
    run: MeasureCode


@dataclass(frozen=True)
class Setting:
    """Which vectors: what names them in rows, and the vectors of each seed.

    Attributes:
        distribution: a law, or the task and moment of a recording.
        workers: how many.
        correlation: between each two workers, as asked for; None: as it is.
        draw: seed -> vectors. Recorded ones are the same for every seed; then only the codes' randomness differs.
    """

    distribution: str
    workers: int
    correlation: float | None
    draw: Callable[[int], Gradients]


def made_setting(law: str, workers: int, correlation: float, length: int) -> Setting:
    """Vectors made by a law.

    Raises:
        ConfigurationError: there is no such law, or it cannot have such a correlation or length.
    """
    check_made(law, length, correlation)
    return Setting(law, workers, correlation, lambda seed: made(law, workers, length, correlation, seed))


def recorded_settings(recorded: Recorded, workers: int) -> list[Setting]:
    """Each moment of a recording that has so many workers: the first ones of them."""
    settings = []
    for name, moment in recorded.moments.items():
        if len(moment.workers) >= workers:
            vectors, earlier = torch.from_numpy(moment.workers[:workers]), torch.from_numpy(moment.earlier)
            same = partial(_same, Gradients(vectors, recorded.shapes, earlier))
            settings.append(Setting(f"{recorded.task}-{name}", workers, None, same))
    return settings


def measure(
    contenders: Sequence[CodeContender],
    settings: Iterable[Setting],
    seeds: int,
    done: Callable[[str], object] = lambda code: None,
) -> list[dict[str, Any]]:
    """One row for each code and setting, in the settings' order. Codes that do not apply to vectors have none.

    Args:
        contenders: who is measured; all on the same vectors.
        settings: on what.
        seeds: 0 .. seeds - 1, of the vectors and of the codes' randomness.
        done: told of each single measurement.
    """
    rows = []
    for setting in settings:
        found: list[list[MeasuredCode]] = [[] for _ in contenders]
        cosines: list[float] = []
        for seed in range(seeds):
            gradients = setting.draw(seed)
            cosine = correlation_of(gradients.vectors)
            cosines += [] if cosine is None else [cosine]
            for contender, results in zip(contenders, found, strict=True):
                result = contender.run(gradients, seed)
                results += [] if result is None else [result]
                done(contender.code)
        actual = sum(cosines) / len(cosines) if cosines else None
        for contender, results in zip(contenders, found, strict=True):
            if results:
                rows.append(_row(contender, setting, results, gradients.length, actual))
    return rows


def parse_code(text: str) -> CodeContender:
    """The code that `thc:bits=4,rounding=nearest` names.

    Raises:
        ConfigurationError: no such code or field, or a value it cannot have.
    """
    name, fields = split_spec(text, "code")
    if name not in _CODES:
        raise unknown("code", name, list(_CODES))
    make, readers = _CODES[name]
    for field in fields:
        if field not in readers:
            raise unknown(f"code {text!r}: field", field, list(readers) or ["none"])
    missing = [field for field in _REQUIRED.get(name, ()) if field not in fields]
    if missing:
        raise ConfigurationError(f"code {text!r}: say {', '.join(missing)}, as in {name}:{missing[0]}=4")
    try:
        settings = {field: readers[field](value, field) for field, value in fields.items()}
        return CodeContender(text, make(**settings))
    except ConfigurationError as error:
        raise ConfigurationError(f"code {text!r}: {error}") from error


def _same(gradients: Gradients, seed: int) -> Gradients:
    return gradients


def _row(
    contender: CodeContender, setting: Setting, results: Sequence[MeasuredCode], length: int, actual: float | None
) -> dict[str, Any]:
    nmse = mean([result.nmse for result in results])
    bits = sum(result.traffic.bits for result in results) / len(results) / length
    asked = actual if setting.correlation is None else setting.correlation
    return {
        "code": contender.code,
        "workers": setting.workers,
        "correlation": _rounded(asked),
        "distribution": setting.distribution,
        "bits_per_coordinate": _rounded(bits),
        "nmse": _rounded(nmse.value),
        "nmse_low": _rounded(max(nmse.low, 0.0)),
        "nmse_high": _rounded(nmse.high),
        "topology": results[0].traffic.topology,
        "correlation_found": _rounded(actual),
        "seeds": len(results),
        "length": length,
    }


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and isfinite(value) else None


def _summed(make: Callable[[Gradients], SumCode | None], gradients: Gradients, seed: int) -> MeasuredCode | None:
    """One round of a sum code through its packed wire forms, after it has learnt from the earlier rounds."""
    code = make(gradients)
    if code is None:
        return None
    world, length = gradients.workers, gradients.length
    rounds = [Round(rank, world, step=len(gradients.earlier) + seed) for rank in range(world)]
    if gradients.shapes:
        code.arrange(0, gradients.shapes)
    first_stats = code.measure(gradients.vectors[0], rounds[0])
    learning = _sum_traffic(code, length, rounds[0], scales=first_stats.numel())
    basis_bits = 0

    def broadcast(row: Tensor) -> None:
        nonlocal basis_bits
        basis_bits += 8 * row.element_size() * row.numel()

    for step, earlier in enumerate(gradients.earlier):
        code.observe(earlier, Round(0, world, step), broadcast)
    pairs = list(zip(gradients.vectors, rounds, strict=True))
    stats = torch.stack([code.measure(vector, this_round) for vector, this_round in pairs]).amax(0)
    messages = [code.encode(vector, stats, this_round) for vector, this_round in pairs]
    wire = code.wire(world)
    packed = wire.pack_total(wire.add(messages, code.lanes(length, rounds[0])))
    traffic = _sum_traffic(code, length, rounds[0], scales=stats.numel())
    if isinstance(code, GradiVeQ):
        traffic = _with_learning(traffic, learning, basis_bits, world)
    mean = code.decode(Total(packed, world, packed=True), stats, length, rounds[0])
    if isinstance(code, LowRank):
        traffic = _with_other_side(traffic, code, gradients.vectors[0], mean, rounds[0], broadcast)
    return MeasuredCode.of(mean, gradients, traffic)


def _sum_traffic(code: SumCode, length: int, this_round: Round, scales: int) -> Traffic:
    lanes, wire = code.lanes(length, this_round), code.wire(this_round.world)
    return sharded(this_round.world, 8 * wire.message_bytes(lanes), 8 * wire.total_bytes(lanes), scales)


def _with_learning(coding: Traffic, learning: Traffic, basis_bits: int, world: int) -> Traffic:
    """The average over GradiVeQ's first rounds: those to learn from, coded ones, and the bases sent around at times."""
    usual = GradiVeQ()
    coded = _ROUNDS - usual.sample_steps
    bases_bits = ceil(coded / usual.code_steps) * (world - 1) / world * basis_bits
    total = usual.sample_steps * learning.bits + coded * coding.bits + bases_bits
    return Traffic(coding.topology, total / _ROUNDS)


def _with_other_side(
    traffic: Traffic, code: LowRank, vector: Tensor, mean: Tensor, this_round: Round, broadcast: Broadcast
) -> Traffic:
    """The average of a round and the next one, which tells the matrices' other side."""
    code.observe(mean, this_round, broadcast)
    after = _sum_traffic(code, len(vector), this_round, scales=code.measure(vector, this_round).numel())
    return Traffic(traffic.topology, (traffic.bits + after.bits) / 2)


def _thc(**settings: Any) -> MeasureCode:
    THC(**settings)  # refused now, if it is to be
    return partial(_summed, lambda gradients: THC(**settings))


def _fixed(**settings: Any) -> MeasureCode:
    FixedPoint(**settings)
    return partial(_summed, lambda gradients: FixedPoint(**settings))


def _gradiveq(inner: str = "fp32", **settings: Any) -> MeasureCode:
    def make(steps: int) -> GradiVeQ:
        return GradiVeQ(THC() if inner == "thc" else None, sample_steps=steps, **settings)

    def fitting(gradients: Gradients) -> SumCode | None:
        convolutions = any(len(shape) > 2 for shape in gradients.shapes)
        return make(len(gradients.earlier)) if convolutions and len(gradients.earlier) >= 4 else None

    make(4)
    return partial(_summed, fitting)


def _low_rank(inner: str = "fp32", **settings: Any) -> MeasureCode:
    def make() -> LowRank:
        return LowRank(inner=THC(block=512) if inner == "thc" else None, **settings)

    def fitting(gradients: Gradients) -> SumCode | None:
        code, this_round, length = make(), Round(0, 1), gradients.length
        code.arrange(0, gradients.shapes or [(length,)])
        shrinks = code.lanes(length, this_round) < code.inner.lanes(length, this_round)
        return code if shrinks and len(gradients.earlier) else None

    make()
    return partial(_summed, fitting)


def _peer(function: Callable[..., MeasuredCode | None], **fixed: Any) -> Callable[..., MeasureCode]:
    return lambda **settings: partial(function, **fixed, **settings)


def _count(low: int, high: int) -> Callable[[str, str], int]:
    def read(text: str, field: str) -> int:
        value = read_count(text, field)
        if not low <= value <= high:
            raise ConfigurationError(f"{field}: must be {low} to {high}, found {value}")
        return value

    return read


def _fraction(text: str, field: str) -> float:
    """`1/32` or `0.03`."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigurationError(f"{field}: must be a number such as 0.03 or 1/32, found {text!r}") from None


def _positive(text: str, field: str) -> float:
    value = _fraction(text, field)
    if value <= 0:
        raise ConfigurationError(f"{field}: must be above 0, found {text}")
    return value


def _word(*allowed: str) -> Callable[[str, str], str]:
    def read(text: str, field: str) -> str:
        if text not in allowed:
            raise ConfigurationError(f"{field}: must be one of {', '.join(allowed)}, found {text!r}")
        return text

    return read


def _yes(text: str, field: str) -> bool:
    return _word("yes", "no")(text, field) == "yes"


def _power_of_two(text: str, field: str) -> int:
    value = read_count(text, field)
    if value < 8 or value & (value - 1):
        raise ConfigurationError(f"{field}: must be a power of two from 8, found {value}")
    return value


_whole = read_count  # what the code's own constructor checks
_LONGEST = 1 << 30
_ROUNDS = 500  # of a training, over which the bits of a code that learns are averaged

_REQUIRED = {
    **dict.fromkeys(("lowrank", "powersgd"), ("rank",)),
    "qsgd": ("levels",),
    **dict.fromkeys(("eden", "lloyd-max"), ("bits",)),
}

# Name -> what makes one round of it from its fields, and how each field is read.
_CODES: Mapping[str, tuple[Callable[..., MeasureCode], Mapping[str, Callable[[str, str], Any]]]] = {
    "fp32": (_peer(fp32), {}),
    "bf16": (_peer(bf16), {}),
    "fp8": (_peer(fp8), {"block": _count(1, _LONGEST)}),
    "fixed": (_fixed, {"bits": _whole, "block": _whole}),
    "thc": (
        _thc,
        {
            "bits": _whole,
            "granularity": _whole,
            "p": _fraction,
            "rounding": _word("correlated", "stochastic", "nearest"),
            "block": _whole,
        },
    ),
    "thc-public": (_peer(thc_public), {"noise": _word("shared", "private"), "norm": _word("whole", "block")}),
    "gradiveq": (_gradiveq, {"inner": _word("fp32", "thc"), "ratio": _positive, "loss": _positive}),
    "lowrank": (_low_rank, {"rank": _count(1, 1024), "inner": _word("fp32", "thc")}),
    "powersgd": (_peer(power_sgd), {"rank": _count(1, 1024)}),
    "qsgd": (
        _peer(qsgd),
        {
            "levels": _count(1, 1 << 20),
            "norm": _word("largest", "euclidean"),
            "bucket": _count(1, _LONGEST),
            "coder": _word("plain", "entropy"),
        },
    ),
    "terngrad": (_peer(tern_grad), {"scale": _word("own", "shared"), "clipped": _positive}),
    "drive": (_peer(drive), {"block": _power_of_two}),
    "eden": (_peer(eden), {"bits": _count(1, 8), "block": _power_of_two, "requantise": _yes}),
    "lloyd-max": (_peer(lloyd_max_limit), {"bits": _count(1, 8)}),
}
