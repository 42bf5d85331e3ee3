"""Measures the error of the mean against the bits that it takes, for sum codes and their peers, on the same vectors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
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
from evenkeel.bench.codes.rows import row_of
from evenkeel.bench.codes.traffic import Traffic, sharded
from evenkeel.bench.codes.vectors import Gradients, check_made, correlation_of, made
from evenkeel.coding.sum_code import Broadcast, SumCode
from evenkeel.coding.sums.by_name import CODES, code_of
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.low_rank import LowRank
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError
from evenkeel.text_values import read_count, read_fraction, split_spec, unknown

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
    "gradiveq+thc",
    "lowrank:rank=4",
    "lowrank:rank=16+thc:block=512",
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
    """Says what is measured: the text that names it, and one round of it, which gives None where it does not apply."""

    code: str
    run: MeasureCode


@dataclass(frozen=True)
class Setting:
    """Says on which vectors: what names them in rows, and the vectors of each seed.

    Attributes:
        distribution: a law, or the task and moment of a recording.
        workers: how many.
        correlation: between each two workers, as given; None: as it is.
        draw: seed -> vectors. Recorded ones are the same for every seed; then only the codes' randomness differs.
    """

    distribution: str
    workers: int
    correlation: float | None
    draw: Callable[[int], Gradients]


def made_setting(law: str, workers: int, correlation: float, length: int) -> Setting:
    """Gives vectors made by a law.

    Raises:
        ConfigurationError: there is no such law, or it cannot have such a correlation or length.
    """
    check_made(law, length, correlation)
    return Setting(law, workers, correlation, lambda seed: made(law, workers, length, correlation, seed))


def recorded_settings(recorded: Recorded, workers: int) -> list[Setting]:
    """Gives each moment of a recording that has so many workers: the first ones of them."""
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
    """Gives a row for each code and setting, in the settings' order. Codes that do not apply to vectors have none.

    Args:
        contenders: who is measured; all on the same vectors.
        settings: on what.
        seeds: 0 .. seeds - 1, of the vectors and of the codes' randomness.
        done: called after each single measurement.
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
                rows.append(
                    row_of(
                        contender.code,
                        setting.distribution,
                        setting.workers,
                        setting.correlation,
                        results,
                        length=gradients.length,
                        found=actual,
                    )
                )
    return rows


def parse_code(text: str) -> CodeContender:
    """Reads `thc:bits=4,rounding=nearest`, as `sums/by_name.py` has it, or a peer such as `eden:bits=2`.

    Raises:
        ConfigurationError: no such code or field, or a value it cannot have.
    """
    name, fields = split_spec(text.partition("+")[0], "code")
    if name in CODES.keys() - _PEERS.keys():
        named = _new_spelling(text, name, fields)
        if isinstance(code_of(named), ErrorFeedback):
            raise ConfigurationError(
                f"code {text!r}: one round is measured, in which nothing is owed yet: leave ef+ out"
            )
        return CodeContender(text, partial(_summed, named))
    if name not in _PEERS or "+" in text:
        raise unknown(
            "code", text if name in _PEERS else name, [*_PEERS, *(each for each in CODES if each not in _PEERS)]
        )
    make, readers = _PEERS[name]
    for field in fields:
        if field not in readers:
            raise unknown(f"code {text!r}: setting", field, list(readers) or ["none"])
    missing = [field for field in _REQUIRED.get(name, ()) if field not in fields]
    if missing:
        raise ConfigurationError(f"code {text!r}: say {', '.join(missing)}, as in {name}:{missing[0]}=4")
    try:
        settings = {field: readers[field](value, field) for field, value in fields.items()}
        return CodeContender(text, partial(make, **settings))
    except ConfigurationError as error:
        raise ConfigurationError(f"code {text!r}: {error}") from error


def _new_spelling(text: str, name: str, fields: Mapping[str, str]) -> str:
    """Gives what `lowrank:rank=16,inner=thc` is called since codes are put inside others with `+`."""
    inner = fields.get("inner")
    if inner not in _OLD_INNER or "+" in text or name not in ("gradiveq", "lowrank"):
        return text
    rest = ",".join(f"{field}={value}" for field, value in fields.items() if field != "inner")
    block = ":block=512" if (name, inner) == ("lowrank", "thc") else ""
    return f"{name}:{rest}+{inner}{block}" if rest else f"{name}+{inner}{block}"


def _same(gradients: Gradients, seed: int) -> Gradients:
    return gradients


def _summed(name: str, gradients: Gradients, seed: int) -> MeasuredCode | None:
    """Plays one round of a sum code through its packed wire forms, after it has learnt from the earlier rounds."""
    code = code_of(name)
    if not _applies(code, gradients):
        return None
    if isinstance(code, GradiVeQ):
        usual, code.sample_steps = code.sample_steps, len(gradients.earlier)
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
        traffic = _with_learning(traffic, learning, basis_bits, world, usual, code.code_steps)
    mean = code.decode(Total(packed, world, packed=True), stats, length, rounds[0])
    if isinstance(code, LowRank):
        traffic = _with_other_side(traffic, code, gradients.vectors[0], mean, rounds[0], broadcast)
    return MeasuredCode.of(mean, gradients, traffic)


def _sum_traffic(code: SumCode, length: int, this_round: Round, scales: int) -> Traffic:
    lanes, wire = code.lanes(length, this_round), code.wire(this_round.world)
    return sharded(this_round.world, 8 * wire.message_bytes(lanes), 8 * wire.total_bytes(lanes), scales)


def _with_learning(
    coding: Traffic, learning: Traffic, basis_bits: int, world: int, sample_steps: int, code_steps: int
) -> Traffic:
    """Averages over GradiVeQ's first rounds: those to learn from, coded ones, and the bases sent around at times."""
    coded = _ROUNDS - sample_steps
    bases_bits = ceil(coded / code_steps) * (world - 1) / world * basis_bits
    total = sample_steps * learning.bits + coded * coding.bits + bases_bits
    return Traffic(coding.topology, total / _ROUNDS)


def _with_other_side(
    traffic: Traffic, code: LowRank, vector: Tensor, mean: Tensor, this_round: Round, broadcast: Broadcast
) -> Traffic:
    """Averages over a round and the next one, which sends the matrices' other side."""
    code.observe(mean, this_round, broadcast)
    after = _sum_traffic(code, len(vector), this_round, scales=code.measure(vector, this_round).numel())
    return Traffic(traffic.topology, (traffic.bits + after.bits) / 2)


def _applies(code: SumCode, gradients: Gradients) -> bool:
    """Tells whether a projection makes something in the vectors smaller, after earlier rounds to learn from."""
    if isinstance(code, GradiVeQ):
        return any(len(shape) > 2 for shape in gradients.shapes) and len(gradients.earlier) >= 4
    if isinstance(code, LowRank):
        code.arrange(0, gradients.shapes or [(gradients.length,)])
        shrinks = code.lanes(gradients.length, Round(0, 1)) < code.inner.lanes(gradients.length, Round(0, 1))
        return shrinks and len(gradients.earlier) > 0
    return True


def _count(low: int, high: int) -> Callable[[str, str], int]:
    def read(text: str, field: str) -> int:
        value = read_count(text, field)
        if not low <= value <= high:
            raise ConfigurationError(f"{field}: must be {low} to {high}, found {value}")
        return value

    return read


def _positive(text: str, field: str) -> float:
    value = read_fraction(text, field)
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


_LONGEST = 1 << 30
_ROUNDS = 500  # of a training, over which the bits of a code that learns are averaged
_OLD_INNER = ("fp32", "thc")

_REQUIRED = {
    "powersgd": ("rank",),
    "qsgd": ("levels",),
    **dict.fromkeys(("eden", "lloyd-max"), ("bits",)),
}

# What are no sum codes: name -> one round of it, and how each field is read.
_PEERS: Mapping[str, tuple[Callable[..., MeasuredCode | None], Mapping[str, Callable[[str, str], Any]]]] = {
    "fp32": (fp32, {}),
    "bf16": (bf16, {}),
    "fp8": (fp8, {"block": _count(1, _LONGEST)}),
    "thc-public": (thc_public, {"noise": _word("shared", "private"), "norm": _word("whole", "block")}),
    "powersgd": (power_sgd, {"rank": _count(1, 1024)}),
    "qsgd": (
        qsgd,
        {
            "levels": _count(1, 1 << 20),
            "norm": _word("largest", "euclidean"),
            "bucket": _count(1, _LONGEST),
            "coder": _word("plain", "entropy"),
        },
    ),
    "terngrad": (tern_grad, {"scale": _word("own", "shared"), "clipped": _positive}),
    "drive": (drive, {"block": _power_of_two}),
    "eden": (eden, {"bits": _count(1, 8), "block": _power_of_two, "requantise": _yes}),
    "lloyd-max": (lloyd_max_limit, {"bits": _count(1, 8)}),
}
