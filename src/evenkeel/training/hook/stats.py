"""Counts what a hook has cost and saved, and tells the bandwidth from which on it costs more than it saves."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["HookStats", "Meter", "Stopwatch", "break_even_bps"]


@dataclass(frozen=True, slots=True)
class HookStats:
    """Holds the figures of one rank, over all compressed steps so far; times and bytes are sums.

    Attributes:
        steps: steps finished, compressed or not.
        compressed_steps: those of them whose gradients were compressed.
        coordinates: gradient elements that went through the code.
        sent_bytes: what this rank has sent in compressed steps: messages, statistics and skipped parameters.
        uncompressed_bytes: what a ring all-reduce of the same gradients in their own type would have sent.
        encode_s: gathering the gradients, statistics, error feedback, encoding and packing.
        add_s: adding messages and packing the sums.
        communicate_s: in exchanges, waiting for slower ranks included.
        decode_s: unpacking, decoding, learning from the mean and writing it back.
        local_nmse: squared error of this rank's own messages over what they were to say (with error feedback: gradient
            and memory), squared; of every 16th step, None before there is one. The error of the mean is smaller, as
            the ranks' errors cancel out.
        break_even_bps: above this bandwidth of a rank's link the code costs more than it saves; 0 if it saves nothing.
            Its cost is encoding, adding, decoding, and what its exchanges took beyond `plain_bps`: it meets more often.
            Waiting for slower ranks is in it, so where they are slow by themselves the true rate is higher.
        plain_bps: the best rate of a bucket that was averaged uncompressed, before compression started: a lower bound
            for the link's bandwidth. 0 where there was none.
        achieved_bps: rate at which compressed exchanges went, waiting for slower ranks included.
        fell_back: sums that had to be made in another way, since the reducer's switch was away.
    """

    steps: int
    compressed_steps: int
    coordinates: int
    sent_bytes: int
    uncompressed_bytes: int
    encode_s: float
    add_s: float
    communicate_s: float
    decode_s: float
    local_nmse: float | None
    break_even_bps: float
    plain_bps: float
    achieved_bps: float
    fell_back: int = 0


@dataclass(slots=True)
class Meter:
    """Keeps running sums; written by the communication thread, read by any."""

    coordinates: int = 0
    sent_bytes: int = 0
    uncompressed_bytes: int = 0
    encode_s: float = 0.0
    add_s: float = 0.0
    communicate_s: float = 0.0
    decode_s: float = 0.0
    error_energy: float = 0.0
    energy: float = 0.0
    plain_bps: float = 0.0

    def plain(self, sent_bytes: int, seconds: float) -> None:
        """Enters a bucket that travelled uncompressed."""
        if seconds > 0:
            self.plain_bps = max(self.plain_bps, 8 * sent_bytes / seconds)

    def encode(self, lap: tuple[float, float]) -> None:
        """Enters a lap of the stopwatch that ended with an encoded message."""
        self.encode_s += lap[0]
        self.communicate_s += lap[1]

    def add_up(self, lap: tuple[float, float]) -> None:
        """Enters a lap that ended with a total."""
        self.add_s += lap[0]
        self.communicate_s += lap[1]

    def decode(self, lap: tuple[float, float]) -> None:
        """Enters a lap that ended with a mean written back."""
        self.decode_s += lap[0]
        self.communicate_s += lap[1]

    def include(self, other: "Meter") -> None:
        """Adds the sums of `other`, a bucket's."""
        for name in self.__slots__:
            if name != "plain_bps":
                setattr(self, name, getattr(self, name) + getattr(other, name))

    def stats(self, steps: int, compressed_steps: int, fell_back: int = 0) -> HookStats:
        """Gives the figures so far."""
        saved = self.uncompressed_bytes - self.sent_bytes
        work_s = self.encode_s + self.add_s + self.decode_s
        if self.plain_bps:
            work_s += max(0.0, self.communicate_s - 8 * self.sent_bytes / self.plain_bps)
        return HookStats(
            steps=steps,
            compressed_steps=compressed_steps,
            coordinates=self.coordinates,
            sent_bytes=self.sent_bytes,
            uncompressed_bytes=self.uncompressed_bytes,
            encode_s=self.encode_s,
            add_s=self.add_s,
            communicate_s=self.communicate_s,
            decode_s=self.decode_s,
            local_nmse=self.error_energy / self.energy if self.energy > 0 else None,
            break_even_bps=break_even_bps(saved, work_s),
            plain_bps=self.plain_bps,
            achieved_bps=8 * self.sent_bytes / self.communicate_s if self.communicate_s > 0 else 0.0,
            fell_back=fell_back,
        )


class Stopwatch:
    """Splits the time of one bucket into phases.

    On a GPU each lap waits for what the current stream has been given, which costs only the thread that runs the watch.
    """

    def __init__(self, device: torch.device, exchanged_s: Callable[[], float]) -> None:
        self._device = device
        self._exchanged_s = exchanged_s
        self._since = self._now()

    def lap(self) -> tuple[float, float]:
        """Measures the seconds since the last lap, apart from exchanges, and the seconds in exchanges."""
        before, self._since = self._since, self._now()
        exchanged_s = self._since[1] - before[1]
        return self._since[0] - before[0] - exchanged_s, exchanged_s

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter(), self._exchanged_s()


def break_even_bps(saved_bytes: float, work_s: float) -> float:
    """Computes the bandwidth at which sending `saved_bytes` takes as long as the `work_s` spent on saving them."""
    if saved_bytes <= 0:
        return 0.0
    return 8 * saved_bytes / work_s if work_s > 0 else float("inf")
