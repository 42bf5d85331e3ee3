"""Draws how late tasks are, by laws that are the same for every policy that is compared.

A law says how many seconds a task takes in all. Draws are counter-based: a hash of (seed, key), never a generator with
a state. So the same piece of work takes the same time under every policy, whatever the order of the calls (common
random numbers), and two policies differ only by what they do about it.

The key names one *attempt*: a hedge is a new attempt and must get a key of its own (`attempt_key`), or it would be
exactly as late as the attempt that it hedges. The worker and the time matter only to laws that depend on them by
nature (a slow worker, a slow spell).
"""

import math
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np

from evenkeel.errors import ConfigurationError

__all__ = [
    "Constant",
    "Delay",
    "FleetSlowdown",
    "MarkovBursts",
    "Pareto",
    "PersistentSlow",
    "Scaled",
    "ShiftedExponential",
    "Trace",
    "TwoMode",
    "attempt_key",
    "draw_bits",
]

_MASK = 2**64 - 1
_SPELLS = 0x5E11  # streams of one seed that must not repeat each other
_ATTEMPTS = 0xA77E
_LONGEST_S = 3600.0  # more in a trace means that it is not in seconds
_CYCLES = 1000  # of slow and fast spells that MarkovBursts chains before it begins afresh
_STANDARD = NormalDist()


class Delay(ABC):
    """Draws task times; see the module's text."""

    @abstractmethod
    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Gives the seconds that a task takes in all.

        Args:
            key: names the attempt at a piece of work.
            worker: number of the worker that does it.
            now_s: when it begins, in seconds since the experiment did.
        """

    @property
    @abstractmethod
    def mean_s(self) -> float:
        """Gives the mean seconds of a task on an ordinary worker; turns a load into a rate."""


@dataclass(frozen=True)
class Constant(Delay):
    """Gives every task the same time; 0 adds no delay at all."""

    seconds: float = 0.0

    def __post_init__(self) -> None:
        _require(self.seconds >= 0, "constant", "seconds", "must not be negative", self.seconds)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Gives `seconds`."""
        return self.seconds

    @property
    def mean_s(self) -> float:
        """Gives the same."""
        return self.seconds


@dataclass(frozen=True)
class TwoMode(Delay):
    """Is mostly quick (lognormal), sometimes several times slower (normal, cut off below zero).

    The defaults are fitted to latencies that the authors of Collage Inference measured on a public cloud: body .138 s,
    slow mode 5.1 times that.
    """

    scale: float = 1.0  # multiplies every draw; below 1 for short experiments
    slow_share: float = 0.021
    mu: float = -1.977  # of the body: mean and standard deviation of the logarithm of its seconds
    sigma: float = 0.222
    slow_mean_s: float = 0.701
    slow_sd_s: float = 0.054
    seed: int = 0
    _slow_below: int = field(init=False, repr=False, compare=False)
    _slow_cut: float = field(
        init=False, repr=False, compare=False
    )  # share of the slow mode's normal that is below zero

    def __post_init__(self) -> None:
        _require(self.scale > 0, "two-mode", "scale", "must be above zero", self.scale)
        _require(0 <= self.slow_share <= 1, "two-mode", "slow-share", "must be from 0 to 1", self.slow_share)
        _require(self.sigma >= 0, "two-mode", "sigma", "must not be negative", self.sigma)
        _require(self.slow_mean_s > 0, "two-mode", "slow-mean", "must be above zero", self.slow_mean_s)
        _require(self.slow_sd_s >= 0, "two-mode", "slow-sd", "must not be negative", self.slow_sd_s)
        object.__setattr__(self, "_slow_below", round(self.slow_share * 2**32))
        cut = _STANDARD.cdf(-self.slow_mean_s / self.slow_sd_s) if self.slow_sd_s else 0.0
        object.__setattr__(self, "_slow_cut", cut)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Draws independently for each key; the worker and the time do not matter."""
        bits = draw_bits(self.seed, key)
        share = ((bits & 0xFFFFFFFF) + 0.5) * 2**-32
        if bits >> 32 < self._slow_below:
            share = self._slow_cut + (1.0 - self._slow_cut) * share
            return self.scale * (self.slow_mean_s + self.slow_sd_s * _STANDARD.inv_cdf(share))
        return self.scale * math.exp(self.mu + self.sigma * _STANDARD.inv_cdf(share))

    @property
    def mean_s(self) -> float:
        """Gives the mean of the mixture."""
        body = math.exp(self.mu + self.sigma**2 / 2)
        slow = self.slow_mean_s
        if self.slow_sd_s:
            slow += self.slow_sd_s * _STANDARD.pdf(-self.slow_mean_s / self.slow_sd_s) / (1 - self._slow_cut)
        return self.scale * ((1 - self.slow_share) * body + self.slow_share * slow)


@dataclass(frozen=True)
class PersistentSlow(Delay):
    """Makes some workers slow for the whole run, as one in fifty was in the data behind `TwoMode`."""

    inner: Delay = field(default_factory=lambda: TwoMode(slow_share=0.0))
    factor: float = 5.1
    slow_workers: tuple[int, ...] | None = None  # None: every fiftieth, beginning with worker 0

    def __post_init__(self) -> None:
        _require(self.factor > 0, "persistent", "factor", "must be above zero", self.factor)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Draws from the inner law, `factor` times longer on a slow worker."""
        slow = worker % 50 == 0 if self.slow_workers is None else worker in self.slow_workers
        return self.inner.draw(key, worker, now_s) * (self.factor if slow else 1.0)

    @property
    def mean_s(self) -> float:
        """Gives the mean of the workers that are not slow: a law cannot know how many workers there are."""
        return self.inner.mean_s


@dataclass(frozen=True)
class MarkovBursts(Delay):
    """Gives each worker slow spells: a two-state Markov chain in time, independent of all other workers.

    What counts is the state at the moment when a task begins. The chain is made from the seed, the worker and the time
    alone: it is cut into stretches of a thousand cycles, each begun afresh in its stationary state, so that any moment
    can be asked for in any order.
    """

    inner: Delay = field(default_factory=lambda: TwoMode(slow_share=0.0))
    spell_s: float = 3.0  # mean length of a slow spell
    duty: float = 0.02  # share of the time that is slow
    factor: float = 5.1
    seed: int = 0
    _spells: "dict[int, _Spells]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require(self.spell_s > 0, "markov", "spell", "must be above zero", self.spell_s)
        _require(0 < self.duty < 1, "markov", "duty", "must be between 0 and 1", self.duty)
        _require(self.factor > 0, "markov", "factor", "must be above zero", self.factor)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Draws from the inner law, `factor` times longer while the worker is in a slow spell at `now_s`."""
        return self.inner.draw(key, worker, now_s) * (self.factor if self.is_slow(worker, now_s) else 1.0)

    def is_slow(self, worker: int, now_s: float) -> bool:
        """Tells whether `worker` is in a slow spell."""
        stretch, at_s = divmod(now_s, _CYCLES * self.spell_s / self.duty)
        spells = self._spells.get(worker)
        if spells is None or spells.stretch != stretch:
            stream = draw_bits(self.seed ^ _SPELLS, (worker << 32) + int(stretch))
            spells = self._spells[worker] = _Spells(stretch, stream, _uniform(stream, 0) < self.duty, [])
        turns = spells.turns
        while not turns or turns[-1] <= at_s:
            slow = (len(turns) % 2 == 0) == spells.begins_slow
            mean_s = self.spell_s if slow else self.spell_s * (1 - self.duty) / self.duty
            length_s = -mean_s * math.log(_uniform(spells.stream, 1 + len(turns)))
            turns.append((turns[-1] if turns else 0.0) + length_s)
        return (bisect_right(turns, at_s) % 2 == 0) == spells.begins_slow

    @property
    def mean_s(self) -> float:
        """Gives the mean over a long time."""
        return self.inner.mean_s * (1 + self.duty * (self.factor - 1))


@dataclass(slots=True)
class _Spells:
    """Holds what is known of one worker's spells in one stretch."""

    stretch: float  # its number
    stream: int  # its random numbers
    begins_slow: bool
    turns: list[float]  # when slow and fast take turns, seconds since the stretch began; grows as it is asked for


@dataclass(frozen=True)
class Pareto(Delay):
    """Has a heavy tail: P(more than t) = (scale / t) ** shape. The variance is infinite up to shape 2."""

    shape: float = 1.5
    scale_s: float = 0.1  # the shortest task
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.shape > 1, "pareto", "shape", "must be above 1 (up to 1 the mean is infinite)", self.shape)
        _require(self.scale_s > 0, "pareto", "scale", "must be above zero", self.scale_s)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Draws independently for each key."""
        return float(self.scale_s * _uniform(self.seed, key) ** (-1 / self.shape))

    @property
    def mean_s(self) -> float:
        """Gives the closed form shape * scale / (shape - 1)."""
        return self.shape * self.scale_s / (self.shape - 1)


@dataclass(frozen=True)
class ShiftedExponential(Delay):
    """Adds an exponential time to a fixed one."""

    shift_s: float = 1.0
    rate_per_s: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.shift_s >= 0, "shifted-exponential", "shift", "must not be negative", self.shift_s)
        _require(self.rate_per_s > 0, "shifted-exponential", "rate", "must be above zero", self.rate_per_s)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Draws independently for each key."""
        return self.shift_s - math.log(_uniform(self.seed, key)) / self.rate_per_s

    @property
    def mean_s(self) -> float:
        """Gives the closed form shift + 1 / rate."""
        return self.shift_s + 1 / self.rate_per_s


@dataclass(frozen=True)
class Trace(Delay):
    """Draws times from a file: text with one number of seconds a line, `.npy`, or `.npz` with one array.

    Raises:
        ConfigurationError: the file cannot be read, or holds something else than seconds from 0 to 3600.
    """

    path: str
    order: Literal["shuffled", "in-turn"] = (
        "shuffled"  # in-turn: key n gets the n-th time, from the start again at the end
    )
    scale: float = 1.0
    seed: int = 0
    _seconds: Sequence[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require(self.scale > 0, "trace", "scale", "must be above zero", self.scale)
        _require(self.order in ("shuffled", "in-turn"), "trace", "order", "must be shuffled or in-turn", self.order)
        object.__setattr__(self, "_seconds", _read_trace(self.path))

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Gives a time of the file, chosen by the key."""
        place = key if self.order == "in-turn" else draw_bits(self.seed, key)
        return self.scale * self._seconds[place % len(self._seconds)]

    @property
    def mean_s(self) -> float:
        """Gives the mean of the file."""
        return self.scale * math.fsum(self._seconds) / len(self._seconds)


@dataclass(frozen=True)
class FleetSlowdown(Delay):
    """Makes everything slow for a while: no redundancy can help, and hedging can only make it worse."""

    inner: Delay = field(default_factory=TwoMode)
    factor: float = 3.0
    from_s: float = 0.0
    to_s: float = math.inf

    def __post_init__(self) -> None:
        _require(self.factor > 0, "fleet", "factor", "must be above zero", self.factor)
        _require(self.to_s > self.from_s, "fleet", "to", "must be later than from", self.to_s)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Draws from the inner law, `factor` times longer for tasks that begin in the window."""
        return self.inner.draw(key, worker, now_s) * (self.factor if self.from_s <= now_s < self.to_s else 1.0)

    @property
    def mean_s(self) -> float:
        """Gives the mean outside the window."""
        return self.inner.mean_s


@dataclass(frozen=True)
class Scaled(Delay):
    """Multiplies the inner law by a factor: what the same machine needs for a model of another cost."""

    inner: Delay = field(default_factory=TwoMode)
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require(self.factor > 0, "scaled", "factor", "must be above zero", self.factor)

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Gives `factor` times the inner draw."""
        return self.factor * self.inner.draw(key, worker, now_s)

    @property
    def mean_s(self) -> float:
        """Gives `factor` times the inner mean."""
        return self.factor * self.inner.mean_s


def attempt_key(key: int, attempt: int) -> int:
    """Gives the key of a further attempt (1, 2, ...) at the piece of work `key`; attempt 0 has the key itself."""
    return key if attempt == 0 else draw_bits(attempt ^ _ATTEMPTS, key)


def _require(holds: bool, law: str, word: str, rule: str, found: object) -> None:
    if not holds:
        raise ConfigurationError(f"delay {law!r}: field {word!r} {rule}, found {found!r}")


def draw_bits(seed: int, key: int) -> int:
    """Gives 64 well-mixed bits of (seed, key): the key-th output of SplitMix64 (Steele, Lea, Flood 2014)."""
    bits = (seed * 0xD1B54A32D192ED03 + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def _uniform(seed: int, key: int) -> float:
    """Gives a number strictly between 0 and 1: 52 bits and a half, so that rounding never gives either end."""
    return ((draw_bits(seed, key) >> 12) + 0.5) * 2**-52


def _read_trace(path: str) -> Sequence[float]:
    where = f"delay 'trace': file {path!r}"
    try:
        if path.endswith((".npy", ".npz")):
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                with loaded:
                    if len(loaded.files) != 1:
                        raise ConfigurationError(
                            f"{where} must hold one array, found {', '.join(loaded.files) or 'none'}"
                        )
                    loaded = loaded[loaded.files[0]]
            seconds = np.asarray(loaded, dtype=np.float64).ravel()
        else:
            lines = Path(path).read_text(encoding="utf-8").split()
            seconds = np.array(lines, dtype=np.float64)
    except OSError as error:
        raise ConfigurationError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{where} must hold one number of seconds a line: {error}") from error
    if not seconds.size:
        raise ConfigurationError(f"{where} is empty")
    if not (np.isfinite(seconds).all() and seconds.min() >= 0 and seconds.max() <= _LONGEST_S):
        raise ConfigurationError(f"{where} must hold seconds from 0 to {_LONGEST_S:.0f}; is it in another unit?")
    return array("d", seconds.tolist())
