"""Compares codes for training on devices that leave: what each moves, stores and computes for the same reliability."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.linear import GradientCode, LinearCode, PartitionCode
from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.errors import ConfigurationError
from evenkeel.figures.estimates import Estimate
from evenkeel.training.plan.decoding import Decodability, alive_sets, decodability

__all__ = ["FAMILIES", "CodingInputs", "CodingOption", "CodingPlan", "bytes_text", "plan_coding"]

_NUMBER_BYTES = 4  # float32 on the devices
_INDEX_BYTES = 4  # of the column of a number, where most are zero
_DRAWS = 400  # rounds of which the bytes are averaged
_FEW = 30  # devices; every size of a code is looked at for so many
_QUICK = 2_000  # losses to count, and to draw, while the smallest code is looked for
_NEAR = 1.1  # of the fewest bytes: less is within what a plan leaves out
_REPLICATION = "hedged replication"


@dataclass(frozen=True)
class CodingInputs:
    """Holds what a plan is made from.

    Attributes:
        devices: how many hold a partition each.
        absence: probability of each to be away in a round, independently of all others.
        success: least probability of a round to be exact.
        rounds: how many there will be.
        samples: rows of data on all devices together.
        features: columns.
        density: share of the data's numbers that are not zero.
        room: largest number of partitions' worth that a device keeps; infinite where it does not matter.
    """

    devices: int
    absence: float
    success: float
    rounds: int
    samples: int
    features: int
    density: float = 1.0
    room: float = float("inf")

    @property
    def rows(self) -> int:
        """Gives the rows of a partition; smaller ones are filled up with zeros."""
        return ceil(self.samples / self.devices)

    def partition_bytes(self, density: float) -> float:
        """Gives the bytes of a partition, written densely or as numbers and their columns, whichever is less."""
        numbers = self.rows * self.features
        return numbers * min(_NUMBER_BYTES, density * (_NUMBER_BYTES + _INDEX_BYTES))


@dataclass(frozen=True)
class CodingOption:
    """Says what one code costs and gains; bytes count both directions of all devices together.

    Attributes:
        family: which kind of code.
        code: its text, for `linear_code`; empty without any code.
        extra_devices: that hold no partition of their own.
        setup_transfers: partitions that travel before the first round.
        setup_bytes: what they weigh where each transfer is one message (unicast).
        setup_broadcast_bytes: where one transmission is heard by all (broadcast).
        round_bytes: of a round in the mean.
        round_broadcast_bytes: the same where the model is sent once for all.
        storage: partitions' worth that a device keeps, in the mean over the devices.
        storage_most: the same of the fullest device.
        compute: passes over a partition (a product, and one of its transpose) in a round, as a multiple of those
            without any code.
        nonzeros: numbers that are kept and are not zero, as a multiple of the data's.
        found: how probably it decodes.
        break_even_rounds: up to so many rounds it moves less than the cheapest hedged replication; None where it always
            does.
    """

    family: str
    code: str
    extra_devices: int
    setup_transfers: int
    setup_bytes: float
    setup_broadcast_bytes: float
    round_bytes: float
    round_broadcast_bytes: float
    storage: float
    storage_most: float
    compute: float
    nonzeros: float
    found: Decodability
    break_even_rounds: float | None = 0.0

    def total_bytes(self, rounds: int) -> float:
        """Gives the bytes of everything, unicast."""
        return self.setup_bytes + rounds * self.round_bytes

    def total_broadcast_bytes(self, rounds: int) -> float:
        """Gives the bytes of everything where one transmission is heard by all."""
        return self.setup_broadcast_bytes + rounds * self.round_broadcast_bytes


@dataclass(frozen=True)
class CodingPlan:
    """Holds what was compared.

    Attributes:
        options: the smallest code of each family that is reliable enough; first without any code.
        left_out: families of which no code is.
        sweep: family -> transfers and chance of every code that was looked at.
        recommended: the one to use; None where none is both reliable and small enough.
        sentence: why.
    """

    inputs: CodingInputs
    options: tuple[CodingOption, ...]
    left_out: tuple[str, ...]
    sweep: dict[str, list[tuple[int, Estimate]]]
    recommended: CodingOption | None
    sentence: str


def _counts(most: int) -> Iterator[int]:
    return iter(range(1, most + 1))


# Family -> its codes for so many devices and such an absence, those that move least first.
FAMILIES: dict[str, Callable[[int, float, float], Iterable[str]]] = {
    "MDS": lambda devices, absence, success: (f"mds:extra={count}" for count in _counts(2 * devices)),
    "MDS on the devices": lambda devices, absence, success: (f"mds:own={count}" for count in _counts(devices)),
    "RLNC": lambda devices, absence, success: (f"rlnc:extra={count}" for count in _counts(2 * devices)),
    "RLNC of half weight": lambda devices, absence, success: (
        f"rlnc:extra={count},weight=half" for count in _counts(2 * devices)
    ),
    "balanced": lambda devices, absence, success: (f"balanced:copies={count}" for count in _counts(devices - 1)),
    "balanced, extra devices": lambda devices, absence, success: _balanced_extra(devices, absence, success),
    _REPLICATION: lambda devices, absence, success: (f"replication:copies={count}" for count in _counts(devices - 1)),
    f"{_REPLICATION} in groups": lambda devices, absence, success: (
        f"replication:groups={count}" for count in range(devices // 2, 0, -1)
    ),
    "gradient coding": lambda devices, absence, success: (f"gradient:losses={count}" for count in _counts(devices - 1)),
    "gradient coding in groups": lambda devices, absence, success: (
        f"gradient:groups={count}" for count in range(devices // 2, 0, -1)
    ),
}


def _balanced_extra(devices: int, absence: float, success: float) -> Iterator[str]:
    """Gives balanced codes on extra devices: of the copies that can be enough, with ever more sums.

    A partition is gone where it and its copies are: `devices * absence^(copies + 1)` bounds what can be reached.
    """
    copies = max(1, ceil(log(devices / (1 - success)) / log(1 / absence) - 1)) if absence else 1
    if devices > _FEW:  # in one row, reliability must grow
        copies += 1
    for more in range(copies, min(copies + 1 + (devices <= _FEW), devices)):
        for extra in range(more, devices + 1):
            yield f"balanced:copies={more},extra={extra}"


def plan_coding(inputs: CodingInputs, done: Callable[[str], object] = lambda family: None) -> CodingPlan:
    """Finds in each family the code that moves least and is reliable enough, and recommends one of them.

    Args:
        inputs: what is known.
        done: called with the name of a family when it has been looked at.

    Raises:
        ConfigurationError: inputs that mean nothing.
    """
    _check(inputs)
    options = [_uncoded(inputs)]
    left_out: list[str] = []
    sweep: dict[str, list[tuple[int, Estimate]]] = {}
    for family, texts in FAMILIES.items():
        found = _smallest(list(texts(inputs.devices, inputs.absence, inputs.success)), inputs)
        sweep[family] = [(len(each.code.transfers), each.found.probability) for each in found]
        if found and found[-1].reliable:
            options.append(_option(family, found[-1], inputs))
        else:
            left_out.append(family)
        done(family)
    copies = [option for option in options if option.family.startswith(_REPLICATION)]
    if copies:
        cheapest = min(copies, key=lambda option: option.total_bytes(inputs.rounds))
        options = [_with_break_even(option, cheapest) for option in options]
    recommended, sentence = _recommend(options, inputs)
    return CodingPlan(inputs, tuple(options), tuple(left_out), sweep, recommended, sentence)


@dataclass(frozen=True)
class _Candidate:
    """Holds a code that was looked at."""

    text: str
    code: LinearCode
    found: Decodability
    reliable: bool


def _smallest(texts: Sequence[str], inputs: CodingInputs) -> list[_Candidate]:
    """Looks for the first code that is reliable enough; gives those that it looked at, the one that it found last.

    For few devices it looks at one after the other, which is what the figure shows. For many it doubles the step until
    one is reliable, and then halves: further on in the list, codes are more reliable.
    """
    if inputs.devices <= _FEW:
        looked = []
        for text in texts:
            looked.append(_look(text, inputs))
            if looked[-1].reliable:
                break
        return looked
    seen: dict[int, _Candidate] = {}
    low, high, step = -1, len(texts) - 1, 1
    while low + 1 < high:
        place = min(low + step, high - 1) if step else (low + high) // 2
        seen[place] = _look(texts[place], inputs)
        if seen[place].reliable:
            high, step = place, 0
        else:
            low, step = place, 2 * step
    if high not in seen and texts:
        seen[high] = _look(texts[high], inputs)
    return [seen[place] for place in sorted(seen) if place <= high]


def _look(text: str, inputs: CodingInputs) -> _Candidate:
    """Makes a code and finds how probably it decodes: roughly, and well where it may be reliable enough."""
    code = linear_code(text, inputs.devices)
    # The work for each set of devices grows with their number.
    effort = min(1.0, (_FEW / inputs.devices) ** 2)
    few = max(200, int(effort * _QUICK))
    found = decodability(code, inputs.absence, patterns=few, draws=few)
    reliable = False
    if found.probability.high >= inputs.success:
        found = decodability(code, inputs.absence, patterns=int(effort * 20_000), draws=int(effort * 10_000))
        reliable = found.probability.value >= inputs.success
    return _Candidate(text, code, found, reliable)


def _check(inputs: CodingInputs) -> None:
    for name, value, low, high in (
        ("devices", inputs.devices, 2, 100),
        ("rounds", inputs.rounds, 1, 10**9),
        ("samples", inputs.samples, inputs.devices, 10**12),
        ("features", inputs.features, 1, 10**9),
    ):
        if not low <= value <= high:
            raise ConfigurationError(f"{name}: must be a whole number from {low} to {high}, found {value}")
    if not 0 < inputs.absence <= 0.5:
        raise ConfigurationError(f"absence: must be above 0 and at most 0.5, found {inputs.absence:g}")
    if not 0.5 <= inputs.success <= 0.9999:
        raise ConfigurationError(f"success: must be from 0.5 to 0.9999, found {inputs.success:g}")
    if not 0 < inputs.density <= 1:
        raise ConfigurationError(f"density: must be above 0 and at most 1, found {inputs.density:g}")
    if not inputs.room >= 1:
        raise ConfigurationError(f"room: must be 1 or more, a device keeps its own data, found {inputs.room:g}")


def _uncoded(inputs: CodingInputs) -> CodingOption:
    """Gives the costs of sending plain gradients and waiting for everybody."""
    everybody = (1 - inputs.absence) ** inputs.devices
    chance = Estimate(everybody, everybody, everybody)
    each = inputs.features * _NUMBER_BYTES
    return CodingOption(
        "no code",
        "",
        0,
        0,
        0.0,
        0.0,
        2 * inputs.devices * each,
        (1 + inputs.devices) * each,
        1.0,
        1.0,
        1.0,
        1.0,
        Decodability(chance, inputs.devices, 0, 1.0, 1.0),
    )


def _option(family: str, candidate: _Candidate, inputs: CodingInputs) -> CodingOption:
    """Gives the costs of a code."""
    text, code, found = candidate.text, candidate.code, candidate.found
    devices, rows, features = inputs.devices, inputs.rows, inputs.features
    partition_bytes = inputs.partition_bytes(inputs.density)
    weights = (code.rows != 0).sum(axis=1)
    # A device of gradient coding keeps all partitions of its row, of any other code the sum alone.
    kept = weights if isinstance(code, GradientCode) else np.ones(code.blocks)
    dense = weights if isinstance(code, GradientCode) else (1 - (1 - inputs.density) ** weights) / inputs.density
    held = np.zeros(code.devices)
    np.add.at(held, list(code.holders), kept)
    alive = alive_sets(code.devices, inputs.absence, _DRAWS)
    if isinstance(code, PartitionCode) and not family.startswith(_REPLICATION):
        up, down, passes = _coded_round(code, alive, rows, features)
    elif isinstance(code, GradientCode):
        there = float(alive.sum()) / _DRAWS
        up, down, passes = there * features, 0.0, float((alive @ weights).mean())
    else:
        # Whoever is late, a copy does it once: as many gradients and passes as there are partitions.
        up, down, passes = float(devices * features), 0.0, float(devices)
    return CodingOption(
        family,
        text,
        code.devices - devices,
        len(code.transfers),
        len(code.transfers) * partition_bytes,
        len({transfer.partition for transfer in code.transfers}) * partition_bytes,
        _NUMBER_BYTES * (code.devices * features + down + up),
        _NUMBER_BYTES * (features + down + up),
        float(held.mean()),
        float(held.max()),
        passes / devices,
        float(dense.sum()) / devices,
        found,
    )


def _coded_round(code: PartitionCode, alive: Array, rows: int, features: int) -> tuple[float, float, float]:
    """Gives the numbers sent up, those sent down besides the model, and the passes of a round, in the mean.

    A device that holds its partition's labels sends its products and its gradient at once. Where someone is missing, a
    few sums (`choose`) are asked for their products as well; all blocks from which what is missing follows get new
    values to be multiplied with, and send a gradient again.
    """
    up = down = passes = 0.0
    counted = 0
    holders = np.array(code.holders)
    for there in alive:
        blocks = code.choose(code.blocks_of(np.flatnonzero(there).tolist()))
        found = code.decoder(blocks, partial=True)
        if found.missing:
            continue
        counted += 1
        own = int(there[: code.partitions].sum())
        up += own * (rows + features)
        passes += own
        lost = np.flatnonzero(~there[: code.partitions])
        if len(lost):
            places = np.flatnonzero(np.abs(found.weights[lost]).sum(axis=0))
            again = np.array(found.blocks)[places]
            sums = int((again >= code.partitions).sum())
            up += sums * rows + len(set(holders[again].tolist())) * features
            down += len(again) * rows
            passes += sums + (len(again) - sums) / 2
    counted = max(counted, 1)
    return up / counted, down / counted, passes / counted


def _with_break_even(option: CodingOption, cheapest: CodingOption) -> CodingOption:
    """Adds up to how many rounds a code moves less than the cheapest replication."""
    saved, dearer = cheapest.setup_bytes - option.setup_bytes, option.round_bytes - cheapest.round_bytes
    if saved < 0:
        rounds: float | None = 0.0
    else:
        rounds = saved / dearer if dearer > 0 else None
    return replace(option, break_even_rounds=rounds)


def _recommend(options: Sequence[CodingOption], inputs: CodingInputs) -> tuple[CodingOption | None, str]:
    """Chooses what moves the fewest bytes in all and fits into the devices, and says why.

    Where several are within a tenth of that, the one that computes and stores least.
    """
    reliable = [option for option in options if option.found.probability.value >= inputs.success]
    fitting = [option for option in reliable if option.storage_most <= inputs.room]
    if not fitting:
        least = min(reliable, key=lambda option: option.storage_most, default=None)
        room = f" with room for {inputs.room:g} partitions a device" if reliable else ""
        advice = f"; {least.code} needs room for {least.storage_most:g}" if least else "; lower --success or --absence"
        return None, f"No code here is exact in {inputs.success:g} of the rounds{room}{advice}."
    fewest = min(option.total_bytes(inputs.rounds) for option in fitting)
    near = [option for option in fitting if option.total_bytes(inputs.rounds) <= _NEAR * fewest]
    best = min(near, key=lambda option: (option.compute, option.storage))
    if not best.code:
        return best, f"Use no code: all devices are there in {best.found.probability.value:.4f} of the rounds."
    sentence = (
        f"Use {best.code}: exact in {best.found.probability.value:.4f} of the rounds, and nothing as reliable here "
        f"moves notably less in {inputs.rounds} rounds ({bytes_text(best.total_bytes(inputs.rounds))}; a device keeps "
        f"up to {best.storage_most:g} partitions' worth)."
    )
    smaller = [option for option in reliable if option.storage_most < best.storage_most and not option.extra_devices]
    if smaller:
        other = min(smaller, key=lambda option: (option.storage_most, option.total_bytes(inputs.rounds)))
        sentence += (
            f" Where devices have room for {other.storage_most:g}, use {other.code}: "
            f"{bytes_text(other.total_bytes(inputs.rounds))}."
        )
    return best, sentence


def bytes_text(count: float) -> str:
    """Kilobytes to terabytes, with three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
