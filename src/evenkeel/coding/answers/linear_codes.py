"""Makes codes over the real numbers: MDS, random linear network codes, the balanced code, replication, gradient coding.

Each is made for a number of devices that have one data partition each. Further blocks lie on these devices themselves,
or on extra ones. A design that is random is drawn again until every small loss of devices decodes with a condition
below a cap; of the designs that were drawn, the best conditioned is kept.

Sources: MDS over the reals, Lee et al. 2018; RLNC, Lin et al., arXiv 1910.10283; gradient coding, Tandon et al. 2017.
The balanced code is ours: each partition goes to a fixed number of sums, and all sums are equally heavy.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb, inf
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear import GradientCode, LinearCode, PartitionCode
from evenkeel.coding.checks import whole
from evenkeel.errors import ConfigurationError
from evenkeel.text_values import read_count, split_spec, unknown

__all__ = ["LINEAR_CODES", "balanced", "gradient", "linear_code", "mds", "replication", "rlnc", "small_losses"]

AnyLinear = TypeVar("AnyLinear", bound=LinearCode)

_GOOD_CONDITION = 30.0  # the best of small losses that is looked for: then another draw hardly gains a digit
_DRAWS = 8  # of a random design, of which the best is kept
_MAX_DEVICES = 1000
_MAX_PATTERNS = 20_000  # sets of devices that are looked at
_PATTERN_WORK = 3.2e9  # partitions^4 for each of those sets: seconds, whatever the number of devices


def mds(devices: int, *, extra: int = 0, own: int = 0, seed: int = 0) -> PartitionCode:
    """Makes a code of which any `devices` blocks decode: further blocks are sums of all partitions.

    The coefficients are Gaussian. Every square part of such rows can be inverted, with probability one, and is far
    better conditioned than one of a real Vandermonde matrix.

    Args:
        devices: how many have a partition.
        extra: how many extra devices keep one further block each.
        own: how many of the devices keep a further block themselves.
        seed: of the coefficients.
    """
    holders = _holders(devices, extra, own, "mds")
    name = f"mds:{_place(extra, own)}"

    def draw(random: np.random.Generator) -> PartitionCode:
        return PartitionCode(_short(random.standard_normal((len(holders), devices))), holders, name=name)

    return _best(draw, seed, min(len(holders), 2))


def rlnc(devices: int, *, extra: int = 0, own: int = 0, half: bool = False, seed: int = 0) -> PartitionCode:
    """Makes a binary random linear network code: each partition is in each further block with probability one half.

    It is one draw, as in the paper, and no better one is looked for.

    Args:
        devices: how many have a partition.
        extra: how many extra devices keep one further block each.
        own: how many of the devices keep a further block themselves.
        half: every block has exactly half of the partitions in it.
        seed: of the draw.
    """
    holders = _holders(devices, extra, own, "rlnc")
    if half:
        whole("rlnc: devices, with weight=half,", devices, 2)
    random = np.random.default_rng(seed)
    if half:
        ranks = random.random((len(holders), devices)).argsort(axis=1).argsort(axis=1)
        parity: Array = (ranks < devices // 2).astype(np.float64)
    else:
        parity = random.integers(0, 2, (len(holders), devices)).astype(np.float64)
        while (empty := ~parity.any(axis=1)).any():  # a block of nothing, one in 2^devices, is drawn again
            parity[empty] = random.integers(0, 2, (int(empty.sum()), devices))
    return PartitionCode(parity, holders, name=f"rlnc:{_place(extra, own)}{',weight=half' if half else ''}")


def balanced(
    devices: int, copies: int, *, extra: int = 0, sizes: ArrayLike | None = None, seed: int = 0
) -> PartitionCode:
    """Makes the balanced code: each partition is in `copies` sums on other devices, and the sums are equally heavy.

    The heaviest partition first, each goes to the lightest sums so far. Coefficients are from .5 to 1.5 with random
    signs, so that none is near zero. Without extra devices each device keeps one sum besides its partition.

    Args:
        devices: how many have a partition.
        copies: in how many sums each partition is.
        extra: how many extra devices keep the sums instead.
        sizes: how heavy each partition is, such as its nonzeros; equal without.
        seed: of the coefficients.
    """
    sums = extra or devices
    holders = range(devices, devices + extra) if extra else range(devices)
    whole("balanced: devices", devices, 1 if extra else 2, _MAX_DEVICES)
    whole("balanced: extra", extra, 0, _MAX_DEVICES)
    whole("balanced: copies", copies, 1, sums if extra else sums - 1)
    weights = _sizes(sizes, devices)
    name = f"balanced:copies={copies}{f',extra={extra}' if extra else ''}"

    def draw(random: np.random.Generator) -> PartitionCode:
        parity = np.zeros((sums, devices))
        for partition, targets in enumerate(_spread(holders, weights, copies, random)):
            signs = random.choice([-1.0, 1.0], copies)
            parity[targets, partition] = signs * _short(random.uniform(0.5, 1.5, copies))
        kept = parity.any(axis=1)
        return PartitionCode(parity[kept], np.array(holders)[kept].tolist(), name=name)

    # What tells designs apart are losses a little larger than any that is survived for certain.
    return _best(draw, seed, min(copies, 3), larger=min(copies + 2, devices - 1))


def replication(
    devices: int, *, copies: int = 0, groups: int = 0, sizes: ArrayLike | None = None, seed: int = 0
) -> PartitionCode:
    """Makes copies of partitions the further blocks.

    Args:
        devices: how many have a partition.
        copies: on how many other devices each partition is, spread as the balanced code's are.
        groups: instead, in how many groups all devices keep all of their group's partitions. That loses a partition
            less often: only where one of few whole groups is away, and not one of many sets of devices.
        sizes: how heavy each partition is; equal without.
        seed: of the placement.
    """
    if bool(copies) == bool(groups):
        raise ConfigurationError("replication: say either copies or groups")
    if groups:
        placed = [(partition, holder) for members in _groups(devices, groups, "replication")
                  for partition in members for holder in members if partition != holder]  # fmt: skip
        name = f"replication:groups={groups}"
    else:
        whole("replication: devices", devices, 2, _MAX_DEVICES)
        whole("replication: copies", copies, 1, devices - 1)
        targets = _spread(range(devices), _sizes(sizes, devices), copies, np.random.default_rng(seed))
        placed = [(partition, holder) for partition, some in enumerate(targets) for holder in some]
        name = f"replication:copies={copies}"
    partitions, holders = zip(*placed, strict=True) if placed else ((), ())
    return PartitionCode(np.eye(devices)[list(partitions)], holders, name=name)


def gradient(devices: int, *, losses: int = 0, groups: int = 0, seed: int = 0) -> GradientCode:
    """Makes gradient coding: each device sends one sum of its partitions' gradients.

    Args:
        devices: how many there are, with a partition each.
        losses: how many may be away, any of them: cyclic rows of `losses + 1` partitions (the paper's algorithm 2).
        groups: instead, in how many groups all devices keep all of their group's partitions (fractional repetition).
        seed: of the cyclic rows.
    """
    if bool(losses) == bool(groups):
        raise ConfigurationError("gradient: say either losses or groups")
    if groups:
        rows = np.zeros((devices, devices))
        for members in _groups(devices, groups, "gradient"):
            rows[np.ix_(members, members)] = 1.0
        return GradientCode(rows, name=f"gradient:groups={groups}")
    whole("gradient: devices", devices, 2, _MAX_DEVICES)
    whole("gradient: losses", losses, 1, devices - 1)

    def draw(random: np.random.Generator) -> GradientCode:
        # Rows of B are orthogonal to those of H; and so is the vector of ones, since the columns of H add up to zero.
        orthogonal = random.standard_normal((losses, devices))
        orthogonal[:, -1] = -orthogonal[:, :-1].sum(axis=1)
        rows = np.zeros((devices, devices))
        for device in range(devices):
            others = (device + 1 + np.arange(losses)) % devices
            rows[device, device] = 1.0
            rows[device, others] = np.linalg.solve(orthogonal[:, others], -orthogonal[:, device])
        return GradientCode(rows, name=f"gradient:losses={losses}")

    return _best(draw, seed, min(losses, 2))


LINEAR_CODES: dict[str, tuple[Callable[..., LinearCode], tuple[str, ...]]] = {
    "mds": (mds, ("extra", "own", "seed")),
    "rlnc": (rlnc, ("extra", "own", "weight", "seed")),
    "balanced": (balanced, ("copies", "extra", "seed")),
    "replication": (replication, ("copies", "groups", "seed")),
    "gradient": (gradient, ("losses", "groups", "seed")),
}


def linear_code(text: str, devices: int, *, sizes: ArrayLike | None = None) -> LinearCode:
    """Makes the code that a text names, such as `balanced:copies=3` or `rlnc:extra=10,weight=half`.

    The text of a code names what the function of that name takes: `mds:extra=7`, `mds:own=8`,
    `balanced:copies=3,extra=8`, `replication:groups=6`, `gradient:losses=3`.

    Args:
        text: what the user wrote.
        devices: how many have a partition.
        sizes: how heavy each partition is, for codes that balance it.

    Raises:
        ConfigurationError: names what is wrong, and what is allowed.
    """
    name, given = split_spec(text, "code")
    if name not in LINEAR_CODES:
        raise unknown("code", name, list(LINEAR_CODES))
    make, fields = LINEAR_CODES[name]
    arguments: dict[str, object] = {}
    for field, value in given.items():
        if field not in fields:
            raise unknown(f"code {name!r}: field", field, fields)
        if field == "weight":
            if value not in ("half", "random"):
                raise unknown(f"code {name!r}: weight", value, ("half", "random"))
            arguments["half"] = value == "half"
        else:
            arguments[field] = read_count(value, f"code {name!r}: field {field!r}")
    if make is balanced and "copies" not in arguments:
        raise ConfigurationError("code 'balanced': field 'copies' is missing; write balanced:copies=3")
    if sizes is not None and make in (balanced, replication):
        arguments["sizes"] = sizes
    return make(devices, **arguments)


def _short(coefficients: FloatArray) -> FloatArray:
    """Rounds coefficients to multiples of 1/256, and none to zero.

    Devices that compute in float32 then use the very coefficients that are solved with. Rounding them there would make
    one error in all rows, which does not average out; and sums of whole numbers, such as 0 and 1, are exact.
    """
    steps = np.rint(coefficients * 256)
    rounded: FloatArray = np.where(steps == 0, 1.0, steps) / 256
    return rounded


def _holders(devices: int, extra: int, own: int, name: str) -> list[int]:
    """Gives who keeps the further blocks: some of the devices, spread evenly, and then the extra ones."""
    whole(f"{name}: devices", devices, 1, _MAX_DEVICES)
    whole(f"{name}: extra", extra, 0, _MAX_DEVICES)
    whole(f"{name}: own", own, 0, devices)
    if not extra + own:
        raise ConfigurationError(f"{name}: say on how many devices further blocks are, with extra or own")
    return [*(place * devices // own for place in range(own)), *range(devices, devices + extra)]


def _place(extra: int, own: int) -> str:
    return ",".join(f"{word}={count}" for word, count in (("extra", extra), ("own", own)) if count)


def _sizes(sizes: ArrayLike | None, devices: int) -> FloatArray:
    found: FloatArray = np.ones(devices) if sizes is None else np.array(sizes, np.float64)
    if found.shape != (devices,) or not np.isfinite(found).all() or found.min() < 0:
        raise ConfigurationError(f"sizes: must be {devices} numbers of 0 or more, one for each partition")
    return found


def _spread(holders: Sequence[int], weights: FloatArray, copies: int, random: np.random.Generator) -> list[list[int]]:
    """Chooses for each partition the `copies` lightest places so far that its own device does not keep.

    Of equally light places, any.
    """
    loads = np.zeros(len(holders))
    order = random.permutation(len(weights))
    order = order[np.argsort(-weights[order], kind="stable")]
    chosen: list[list[int]] = [[] for _ in weights]
    places = np.array(holders)
    for partition in order.tolist():
        lightest = np.lexsort((random.random(len(places)), loads, places == partition))[:copies]
        loads[lightest] += weights[partition]
        chosen[partition] = lightest.tolist()
    return chosen


def _groups(devices: int, groups: int, name: str) -> list[list[int]]:
    whole(f"{name}: devices", devices, 1, _MAX_DEVICES)
    whole(f"{name}: groups", groups, 1, devices)
    # Neighbours are apart: they may have more in common, such as a class that they alone have.
    return [list(range(first, devices, groups)) for first in range(groups)]


def _best(draw: Callable[[np.random.Generator], AnyLinear], seed: int, losses: int, larger: int = 0) -> AnyLinear:
    """Draws designs and keeps the best.

    It is the one that fails for the fewest losses of up to `losses` devices; of those, for the fewest losses of
    `larger` devices, where that is not 0; of those, the one whose worst condition after a small loss is smallest.
    """
    random = np.random.default_rng(seed)
    best, best_grade = None, (inf, inf, inf)
    for _ in range(_DRAWS):
        code = draw(random)
        conditions = code.conditions(~small_losses(code.devices, losses, code.partitions))
        failed = 0.0
        if larger:
            alive = ~_some_losses(code.devices, larger, _budget(code.partitions) // 12)
            failed = float(np.isinf(code.conditions(alive)).sum())
        grade = (float(np.isinf(conditions).sum()), failed, float(conditions.max(initial=1.0)))
        if best is None or grade < best_grade:
            best, best_grade = code, grade
        if best_grade <= (0, 0, _GOOD_CONDITION):
            break
    assert best is not None
    return best


def small_losses(devices: int, losses: int, partitions: int) -> Array:
    """Gives sets of up to `losses` devices that are lost, `[sets, devices]`: all of them, or as many as are cheap.

    What is too many is drawn at random, of the largest size, with a fixed seed.
    """
    budget = _budget(partitions)
    result = []
    for size in range(1, min(losses, devices) + 1):
        if comb(devices, size) > budget:
            result.append(_some_losses(devices, size, budget))
            break
        lost = np.array(list(combinations(range(devices), size)))
        patterns = np.zeros((len(lost), devices), bool)
        np.put_along_axis(patterns, lost, True, axis=1)
        result.append(patterns)
        budget -= len(lost)
    return np.concatenate(result) if result else np.zeros((0, devices), bool)


def _budget(partitions: int) -> int:
    """Gives how many sets of devices may be looked at."""
    return min(max(200, int(_PATTERN_WORK / partitions**4)), _MAX_PATTERNS)


def _some_losses(devices: int, size: int, count: int) -> Array:
    """Draws sets of `size` lost devices, with a fixed seed."""
    ranks = np.random.default_rng(0).random((count, devices)).argsort(axis=1).argsort(axis=1)
    lost: Array = ranks < size
    return lost
