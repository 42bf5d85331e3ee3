"""Runs `evenkeel bench coded`."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.bench.coded.data import LabelledRows, made, read_rows
from evenkeel.bench.coded.figure import coded_figure
from evenkeel.bench.coded.fleet import BIASES, SLOWNESS, FleetSettings
from evenkeel.bench.coded.measure import measure
from evenkeel.bench.coded.rows import notes_of, pages_of
from evenkeel.bench.coded.schemes import scheme_of
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.text_values import read_duration_s, read_number, read_quantity, read_rate_bps, unknown

__all__ = ["CodedArguments", "run_coded"]

_NUMBER_BITS = 32


@dataclass(frozen=True)
class CodedArguments:
    """Holds the options of `evenkeel bench coded`; `--help` says what each one means."""

    data: tuple[Path, ...]
    positive: float | None
    samples: str
    features: str
    codes: tuple[str, ...]
    devices: int
    rounds: int
    absence: str
    bias: str
    slowness: str
    delay: str
    rate: str
    latency: str
    seed: int
    outputs: Outputs


def run_coded(arguments: CodedArguments) -> None:
    """Runs `evenkeel bench coded`: every scheme on the same devices."""
    arguments.outputs.check()
    codes = tuple(dict.fromkeys(arguments.codes)) or _default_codes(arguments.devices)
    for text in codes:
        scheme_of(text, arguments.devices)
    settings = _settings(arguments)
    latency_s = read_duration_s(arguments.latency, "latency")
    if latency_s < 0:
        raise ConfigurationError(f"latency: must not be negative, found {arguments.latency!r}")
    number_s = _NUMBER_BITS / read_rate_bps(arguments.rate, "rate")
    rows: list[dict[str, Any]] = []
    sets = _data(arguments)
    with bars(Console(stderr=True), 26) as progress:
        task = progress.add_task("coded", total=len(sets) * len(settings) * len(codes))
        for data in sets:
            rows += measure(
                data,
                codes,
                settings,
                devices=arguments.devices,
                rounds=arguments.rounds,
                latency_s=latency_s,
                number_s=number_s,
                seed=arguments.seed,
                done=lambda text: progress.update(task, advance=1, description=text),
            )
    publish(
        pages_of(rows),
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=["", *notes_of(rows)],
        draw=lambda: coded_figure(rows),
    )


def _default_codes(devices: int) -> tuple[str, ...]:
    """Gives what `plan coding` finds for 20 devices that are away in a fifth of the rounds, for so many devices."""
    copies = min(5, devices - 1)
    return (
        "wait",
        "drop",
        f"replication:groups={ceil(devices / 4)}",
        f"gradient:groups={ceil(devices / 4)}",
        f"gradient:losses={min(ceil(0.4 * devices), devices - 1)}",
        f"mds:extra={ceil(0.6 * devices)}",
        f"rlnc:extra={ceil(0.7 * devices)}",
        f"balanced:copies={copies}",
        f"balanced:copies={min(4, copies)},extra={ceil(0.75 * devices)}",
    )


def _data(arguments: CodedArguments) -> list[LabelledRows]:
    samples = read_quantity(arguments.samples, "samples")
    if not arguments.data:
        return [made(samples, read_quantity(arguments.features, "features"), arguments.seed)]
    return [read_rows(path, arguments.positive) for path in arguments.data]


def _settings(arguments: CodedArguments) -> list[FleetSettings]:
    law = parse_delay(arguments.delay)
    shares = [read_number(text, "absence") for text in _parts(arguments.absence)]
    for share in shares:
        if not 0 <= share <= 0.5:
            raise ConfigurationError(f"absence: must be from 0 to 0.5, found {share:g}")
    biases, slow = _parts(arguments.bias), _parts(arguments.slowness)
    for word in biases:
        if word not in BIASES:
            raise unknown("bias", word, BIASES)
    for word in slow:
        if word not in SLOWNESS:
            raise unknown("slowness", word, SLOWNESS)
    return [
        FleetSettings(share, bias, slowness, law)
        for bias in BIASES
        if bias in biases
        for share in shares
        for slowness in SLOWNESS
        if slowness in slow
    ]


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))
