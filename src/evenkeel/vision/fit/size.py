"""Chooses the largest tile network whose measured pass costs no more than it may."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from torch import nn

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.models.black_box import BlackBox
from evenkeel.models.measure import ModelSession, interleaved_latencies_ms
from evenkeel.vision.fit.loop import FIT_MEAN, FIT_STD
from evenkeel.vision.networks.architecture import CollageNet, TileNet
from evenkeel.vision.networks.export import fold_norms, write_onnx
from evenkeel.vision.networks.own_tiles import OwnTiles

__all__ = ["Size", "choose_own_side", "choose_size", "max_measured", "max_own_measured", "sizes", "tile_sides"]

_ROUNDS = 200  # two seconds each; with fewer, one disturbance halfway sent the search down by two sizes
_MARGIN = 0.98  # what is aimed at; the medians of two measurements differ by one per cent
_WIDTHS = (24, 88, 128)
_ONLY_COARSE = 64  # pixels; with 100 classes a coarse network was 2 points ahead of a fine one in the same time
_STEP = 8  # channels: ONNX Runtime computes them in blocks of eight with AVX2
_OWN_STEP = 4  # pixels
_DIVIDED = 32  # pixels; five halvings
_LEAST_OWN = 32  # pixels along a tile; below, most classifiers' last maps are one or two numbers wide


@dataclass(frozen=True, order=True)
class Size:
    """Holds the channels of a tile network's three blocks, its tile's side in pixels, and whether it is coarse.

    One that is `own` is the classifier itself at that side, with the classifier's channels, but perhaps without the
    last of its residual blocks, as many as are `left_out`.
    """

    widths: tuple[int, ...]
    side: int = 32
    coarse: bool = False
    own: bool = False
    left_out: int = 0

    def __str__(self) -> str:
        if self.own:
            without = f" without its last {self.left_out} residual blocks" if self.left_out else ""
            return f"the classifier's own weights{without}, tiles of {self.side} pixels"
        return f"channels {self.widths}, {'coarse ' if self.coarse else ''}tiles of {self.side} pixels"

    def network(self, classifier: BlackBox) -> TileNet | OwnTiles:
        """Makes a network of this size, for the classes of `classifier`, or with its weights."""
        if self.own:
            return OwnTiles(classifier, self.side, FIT_MEAN, FIT_STD, self.left_out)
        return self.fresh(classifier.classes)

    def fresh(self, classes: int) -> TileNet:
        """Makes a network of this size with weights drawn at random."""
        first, second, third = self.widths
        return TileNet(classes, (first, second, third), self.side, self.coarse)


def sizes(side: int, coarse: bool = False, widest: int = 128) -> list[Size]:
    """Gives sizes from small to large, each a little costlier than the one before, for tiles of `side` pixels."""
    found = []
    for fiftieth in range(20, 50 * widest // _WIDTHS[0] + 1):
        scale = fiftieth / 50
        widths = tuple(max(_STEP, _STEP * round(width * scale / _STEP)) for width in _WIDTHS)
        size = Size((widths[0], widths[1], widths[2]), side, coarse)
        if size not in found:
            found.append(size)
    return found


def tile_sides(height: int, width: int) -> list[int]:
    """Gives the sides that a tile of such an image may have, largest first: as many pixels as the image has, and less.

    A tile is square, so an image of other proportions is squeezed into it.
    """
    square = math.isqrt(height * width)
    return list(range(square // 16 * 16, 31, -16)) or [32]


def choose_size(
    classifier: Callable[[], object],
    grid: int,
    cost: float,
    classes: int,
    height: int,
    width: int,
    precision: str = "int8",
    report: Callable[[int], object] = lambda done: None,
) -> tuple[Size, float]:
    """Finds the largest size that costs at most `cost` passes of the classifier for a full collage; gives its cost too.

    The tile is as large as it can be while the network keeps at least (24, 88, 128) channels, coarse if need be; where
    even the smallest tile leaves fewer, they are what is cut. (3x3 of 32 pixels in the time of (8, 32, 48) channels:
    a coarse network of (32, 112, 160), with two and a half times the multiplications.) Tiles of 64 pixels and more are
    only read coarsely: more channels are worth more than a finer map there.

    Args:
        classifier: runs one pass of the classifier on one thread.
        grid: tiles along one side of a collage.
        cost: that is allowed.
        classes: how many scores a tile gets.
        height: of the classifier's images, pixels.
        width: the same.
        precision: of the network's convolutions: int8 or fp32.
        report: called with 1 for each size that is measured; they are at most `max_measured(height, width)`, unless the
            machine is disturbed.

    Raises:
        ConfigurationError: even the smallest network costs more.
    """
    measured: dict[Size, float] = {}

    def measure(size: Size) -> float:
        if size not in measured:
            report(1)
            measured[size] = _cost(classifier, size, grid, classes, precision)
        return measured[size]

    for side, coarse in product(tile_sides(height, width), (False, True)):
        if not coarse and side >= _ONLY_COARSE:
            continue
        if measure(Size(_WIDTHS, side, coarse)) <= cost * _MARGIN:
            break
    ladder = sizes(side, coarse)
    low, high = -1, len(ladder)  # the last one known to fit, the first one known not to
    while high - low > 1:
        middle = (low + high) // 2
        if measure(ladder[middle]) <= cost * _MARGIN:
            low = middle
        else:
            high = middle
    while low >= 0:
        # Once more, in a file of its own: one disturbance must not choose a network that is too large.
        report(1)
        again = _cost(classifier, ladder[low], grid, classes, precision)
        if again <= cost:
            return ladder[low], max(again, measured[ladder[low]])
        low -= 1
        if low >= 0:
            measure(ladder[low])
    raise ConfigurationError(
        f"cost: the smallest network costs {measure(ladder[0]):.2f} of one pass of the classifier at grid {grid}, "
        f"{cost} is allowed; allow more with --cost, or take a smaller grid"
    )


def choose_own_side(
    classifier: BlackBox,
    grid: int,
    cost: float,
    precision: str = "int8",
    report: Callable[[int], object] = lambda done: None,
    left_out: int = 0,
    above: int = 0,
) -> tuple[Size, float]:
    """Finds the largest side at which the classifier itself reads the tiles of a collage at `cost`; gives its cost too.

    Args:
        classifier: the user's.
        grid: as for `choose_size`, as are `cost`, `precision` and `report`.
        cost: see there.
        precision: see there.
        report: see there.
        left_out: of its late residual blocks; what they cost goes into the side.
        above: pixels; only larger sides will do.

    Raises:
        ConfigurationError: its graph cannot be trained, or even the smallest tiles cost more.
    """
    longest = math.isqrt(classifier.height * classifier.width)
    least = max(_LEAST_OWN, above // _OWN_STEP * _OWN_STEP + _OWN_STEP)
    costs: dict[int, float | ConfigurationError] = {}

    def cost_of(side: int) -> float | ConfigurationError:
        """Gives the cost at a side, or why the graph cannot take it."""
        if side not in costs:
            report(1)
            costs[side] = _own_cost(classifier, Size((), side, own=True, left_out=left_out), grid, precision)
        return costs[side]

    sides = list(range(least, longest + 1, _OWN_STEP))
    # A pass costs what its pixels do: the first guess is mostly right, so that few sides are measured.
    guess = math.isqrt(int(cost * classifier.height * classifier.width / grid**2)) // _OWN_STEP * _OWN_STEP
    found = _largest_side(sides, cost * _MARGIN, cost_of, guess)
    if any(side > (found or 0) and isinstance(costs[side], ConfigurationError) for side in costs):
        # Some graphs take those sides alone that all their halvings divide.
        divided = [side for side in sides if side % _DIVIDED == 0 and side > (found or 0)]
        found = _largest_side(divided, cost * _MARGIN, cost_of) or found
    if found is not None:
        size, measured = Size((), found, own=True, left_out=left_out), costs[found]
        assert isinstance(measured, float)
        return size, measured
    refused = [each for each in costs.values() if isinstance(each, ConfigurationError)]
    known = {side: each for side, each in costs.items() if isinstance(each, float)}
    why = f"the classifier takes images of {longest} pixels, and tiles below {least} say too little"
    if known:
        why = f"at {min(known)} pixels a tile its pass costs {known[min(known)]:.2f}"
    if refused and not known:  # no side will do
        raise refused[-1]
    if refused:
        raise ConfigurationError(f"{refused[-1]}; and {why}, where {cost:g} is allowed")
    raise ConfigurationError(f"the classifier cannot read {grid}x{grid} tiles itself at cost {cost:g}: {why}")


def _largest_side(
    sides: list[int], cost: float, cost_of: Callable[[int], float | ConfigurationError], guess: int = 0
) -> int | None:
    """Finds the largest of `sides` that costs at most `cost`, by halving; None where none does.

    Sides that the graph cannot take are passed over: it is assumed that they are the small ones.
    """
    low, high, found = -1, len(sides), None
    while high - low > 1:
        middle = sides.index(guess) if low == -1 and high == len(sides) and guess in sides else (low + high) // 2
        measured = cost_of(sides[middle])
        if isinstance(measured, ConfigurationError):
            low, high = (middle, high) if found is None else (low, middle)
        elif measured <= cost:
            low, found = middle, sides[middle]
        else:
            high = middle
    return found


def _own_cost(classifier: BlackBox, size: Size, grid: int, precision: str) -> float | ConfigurationError:
    """Measures what the classifier's own weights cost at a size; gives the error where its graph cannot take it."""
    try:
        network = size.network(classifier).eval()
    except ConfigurationError as error:  # a map may be too small for what reads it
        return error
    try:
        return _cost_of(classifier.one_pass(), network, size.side, grid, precision)
    except (EvenkeelError, OSError):
        raise
    except Exception as error:  # those of the exporter, the quantiser and ONNX Runtime have no common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigurationError(
            f"the classifier's graph cannot be written again for tiles of {size.side} pixels: {first}"
        ) from error


def max_own_measured(height: int, width: int) -> int:
    """Counts the sides that `choose_own_side` measures at most, of a graph that takes all but small ones."""
    return math.ceil(math.log2(max(2, math.isqrt(height * width) // _OWN_STEP))) + 1


def max_measured(height: int, width: int) -> int:
    """Counts the sizes that `choose_size` measures at most on a quiet machine."""
    return 2 * len(tile_sides(height, width)) + math.ceil(math.log2(len(sizes(32)) + 1)) + 1


def _cost(classifier: Callable[[], object], size: Size, grid: int, classes: int, precision: str) -> float:
    network = fold_norms(size.fresh(classes))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)  # biases that are alike, as at the start, become one in the file
    return _cost_of(classifier, network, size.side, grid, precision)


def _cost_of(classifier: Callable[[], object], network: nn.Module, tile_side: int, grid: int, precision: str) -> float:
    side = grid * tile_side
    canvas = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.onnx"
        collages = CollageNet(network, grid, tile_side)
        write_onnx(collages, path, side, FIT_MEAN, FIT_STD, canvas if precision == "int8" else None)
        candidate = ModelSession.open(path)
    base, collage = interleaved_latencies_ms([classifier, lambda: candidate(canvas)], _ROUNDS)
    return collage / base
