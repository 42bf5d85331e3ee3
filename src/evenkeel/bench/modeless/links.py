"""Carries datagrams on a virtual clock, at the rate of a trace, with delay and loss."""

import random
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.backends.lossy.backend import DatagramLink
from evenkeel.backends.lossy.packets import PacketKind
from evenkeel.clock import VirtualClock
from evenkeel.errors import ConfigurationError

__all__ = ["Link", "Rate", "Relay", "cellular_law", "losses", "read_rate"]

_HEADERS = 28  # bytes of UDP and IP around a datagram
_LONGEST_QUEUE_S = 2.0  # beyond, the link drops
_GREETING = PacketKind.PONG  # kinds up to this one pass: a session stands before anything is measured
_BUCKET_BYTES = 1500  # of a delivery opportunity in Mahimahi's traces


@dataclass(frozen=True)
class Rate:
    """Holds the bytes that a link can carry in each millisecond; it begins anew where it ends.

    Attributes:
        name: for tables.
        carried: bytes up to the end of each millisecond, [n].
    """

    name: str
    carried: FloatArray

    @classmethod
    def of(cls, name: str, per_ms: FloatArray) -> "Rate":
        """Makes one of the bytes in each millisecond.

        Raises:
            ConfigurationError: it carries nothing.
        """
        carried = np.cumsum(np.asarray(per_ms, np.float64))
        if not len(carried) or not carried[-1] > 0:
            raise ConfigurationError(f"trace {name}: carries nothing")
        return cls(name, carried)

    @property
    def mbit(self) -> float:
        """Gives the mean rate, Mbit/s."""
        return float(self.carried[-1] * 8 / len(self.carried) / 1e3)

    def bytes_by(self, seconds: float) -> float:
        """Gives the bytes that the link could have carried by a moment."""
        rounds, ms = divmod(int(seconds * 1e3), len(self.carried))
        return rounds * float(self.carried[-1]) + (float(self.carried[ms - 1]) if ms else 0.0)

    def time_of(self, total: float) -> float:
        """Gives the moment by which it could have carried so many bytes."""
        rounds, rest = divmod(total, float(self.carried[-1]))
        return (rounds * len(self.carried) + int(np.searchsorted(self.carried, rest)) + 1) / 1e3


def cellular_law(seed: int = 0, seconds: int = 120) -> Rate:
    """Makes a rate like that of a driven cellular link: some Mbit/s that wander, with outages of up to a second.

    A log-normal walk around 3 Mbit/s in steps of 20 ms; 2 % of the time lie in outages of 300 ms on average.
    """
    chance = np.random.default_rng(seed)
    steps = seconds * 50
    walk = np.zeros(steps)
    for place in range(1, steps):
        walk[place] = 0.98 * walk[place - 1] + 0.12 * chance.normal()
    rate = 3e6 / 8 / 1e3 * np.exp(walk)
    out, place = np.zeros(steps, bool), 0
    while place < steps:
        place += int(chance.exponential(15.0 / 0.02)) + 1
        length = int(min(50, chance.exponential(15.0))) + 1
        out[place : place + length] = True
        place += length
    return Rate.of("cellular law", np.repeat(np.where(out, 0.0, rate), 20))


def read_rate(text: str) -> Rate:
    """Reads `FILE.npz:NAME` (delivery opportunities of 1,500 bytes in each ms) or `FILE.parquet:ROW` (`t_s`, `mbps`).

    Raises:
        ConfigurationError: it is neither.
    """
    file, _, which = text.rpartition(":")
    path = Path(file)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return Rate.of(which, arrays[which].astype(np.float64) * _BUCKET_BYTES)
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            row = parquet.read_table(path).slice(int(which), 1).to_pylist()[0]
            times, mbps = np.asarray(row["t_s"], float), np.asarray(row["mbps"], float)
            moments = np.arange(0, times[-1] - times[0], 1e-3)
            return Rate.of(f"{row['dataset']} {which}", np.interp(moments, times - times[0], mbps) * 1e6 / 8 / 1e3)
    except (OSError, KeyError, IndexError, ValueError, ImportError) as error:
        raise ConfigurationError(f"trace {text}: cannot be read: {error}") from error
    raise ConfigurationError(f"trace {text!r}: expected FILE.npz:NAME or FILE.parquet:ROW")


@dataclass(frozen=True)
class Link:
    """Describes a link.

    Attributes:
        rate: of the way to the data centre; the way back is never full.
        round_trip_s: without queueing.
        loss: share of the packets that are lost, each way.
        burst: packets lost in a row, on average; 1: each by itself.
        seed: of the losses.
    """

    rate: Rate
    round_trip_s: float
    loss: float
    burst: float = 1.0
    seed: int = 1


def losses(share: float, burst: float, seed: int) -> Iterator[bool]:
    """Draws for packet after packet if it is lost; the lengths of bursts are geometric (Gilbert and Elliott)."""
    chance, bad = random.Random(seed), False
    leave = 1.0 / burst
    enter = leave * share / (1.0 - share)
    while True:
        bad = chance.random() < share if burst == 1.0 else chance.random() < (1.0 - leave if bad else enter)
        yield bad


class Relay(DatagramLink):
    """Stands between both ends."""

    where = "relay"

    def __init__(self, clock: VirtualClock, link: Link) -> None:
        self._clock, self._link = clock, link
        self._lost = losses(link.loss, link.burst, link.seed), losses(link.loss, link.burst, link.seed + 1)
        self._full_to = 0.0  # bytes of the rate that are spoken for
        self.to_server: Callable[[bytes, Hashable], object]
        self.to_client: Callable[[bytes], object]
        self.bytes_there = 0

    async def open(self, received: Callable[[bytes], object]) -> None:
        """Is open."""

    def arrival(self, size: int) -> float | None:
        """Gives when a datagram that is sent now arrives at the data centre; None: it is lost."""
        now = self._clock.time()
        self.bytes_there += size + _HEADERS
        self._full_to = max(self._full_to, self._link.rate.bytes_by(now)) + size + _HEADERS
        leaves_s = self._link.rate.time_of(self._full_to)
        lost = next(self._lost[0])
        return None if lost or leaves_s > now + _LONGEST_QUEUE_S else leaves_s + self._link.round_trip_s / 2

    def lost_back(self) -> bool:
        """Draws whether a datagram is lost on its way back."""
        return next(self._lost[1])

    def send(self, data: bytes) -> None:
        """Carries a datagram to the server."""
        if data[0] <= _GREETING:
            self._clock.call_at(self._clock.time() + self._link.round_trip_s / 2, self.to_server, data, "camera")
        elif (arrival := self.arrival(len(data))) is not None:
            self._clock.call_at(arrival, self.to_server, data, "camera")

    def back(self, data: bytes, peer: Hashable) -> None:
        """Carries a datagram to the client."""
        if data[0] <= _GREETING or not self.lost_back():
            self._clock.call_at(self._clock.time() + self._link.round_trip_s / 2, self.to_client, data)
