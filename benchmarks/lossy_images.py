"""What does the loss of packets cost a classifier, with and without concealment, parity and sending again?

The shipped classifier answers the 400 shipped test images (32 x 32 pixels, JPEG, packets of 100 bytes) that cross a
relay with loss and delay, on a virtual clock: the transport is the real one, and every run is exactly repeatable. Loss
is independent, or in bursts of three packets on average (Gilbert-Elliott). Last, on the real clock, what either end
spends on an image beside its model.

    python benchmarks/lossy_images.py
    python benchmarks/lossy_images.py --card light.json --images images.parquet --split val --limit 1000 --payload 200
"""

import argparse
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
from output import show, write_json

from evenkeel.arrays import PixelArray
from evenkeel.backends.backend import Reply
from evenkeel.backends.lossy.backend import DatagramLink, LossyBackend, LossyOptions
from evenkeel.backends.lossy.conceal import conceal
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.packets import (
    ImagePacket,
    PacketKind,
    Seal,
    interval_numbers,
    laid_out,
    read_intervals,
)
from evenkeel.backends.lossy.server import LossyImage, LossyServer
from evenkeel.bench.modeless.links import losses
from evenkeel.clock import VirtualClock
from evenkeel.figures.estimates import exact_share
from evenkeel.images.image_set import read_images
from evenkeel.models.cards import load_card
from evenkeel.models.session import open_session
from evenkeel.models.shipped import IMAGES, card_path

_PAYLOAD = 100
_WAIT_S = 0.05
_BURST = 3.0  # packets, on average
_GREETING = PacketKind.PONG  # kinds up to this one are not lost: the session stands already
_METHODS: dict[str, dict[str, Any]] = {
    "no concealment": {"retransmit": False, "conceal": False},
    "concealment": {"retransmit": False},
    "parity 1/4": {"retransmit": False, "parity": 0.25},
    "sent again, no concealment": {"conceal": False},
    "sent again": {},
}


class Relay(DatagramLink):
    """Carries datagrams after half a round trip, and loses some on either way."""

    where = "relay"

    def __init__(self, clock: VirtualClock, round_trip_s: float, share: float, burst: float, seed: int) -> None:
        self._clock, self._delay_s = clock, round_trip_s / 2
        self._lost = losses(share, burst, seed), losses(share, burst, seed + 1)
        self.to_server: Callable[[bytes, Hashable], object]
        self.to_client: Callable[[bytes], object]

    async def open(self, received: Callable[[bytes], object]) -> None:
        """Is open."""

    def send(self, data: bytes) -> None:
        """Carries a datagram to the server."""
        if not (data[0] > _GREETING and next(self._lost[0])):
            self._clock.call_at(self._clock.time() + self._delay_s, self.to_server, data, "camera")

    def back(self, data: bytes, peer: Hashable) -> None:
        """Carries a datagram to the client."""
        if not (data[0] > _GREETING and next(self._lost[1])):
            self._clock.call_at(self._clock.time() + self._delay_s, self.to_client, data)


def seen(
    images: PixelArray,
    form: JpegForm,
    options: LossyOptions,
    round_trip_s: float,
    share: float,
    burst: float,
    seed: int,
) -> tuple[PixelArray, list[bool], int]:
    """Sends images one by one; gives what the model saw of each, if it was asked in time, and the bytes sent."""
    clock = VirtualClock()
    relay = Relay(clock, round_trip_s, share, burst, seed)
    pixels, asked, current = np.full_like(images, 128), [False] * len(images), [0]

    def answer(image: LossyImage, on_reply: Callable[[Reply], object]) -> None:
        pixels[current[0]], asked[current[0]] = image.pixels, True
        clock.call_soon(on_reply, Reply(np.zeros((1, 10), np.float32)))

    server = LossyServer(answer, relay.back, clock, {"classifier": ""})
    backend = LossyBackend("lossy", relay, "classifier", form, options=options, clock=clock)
    relay.to_server, relay.to_client = server.received, backend.received
    backend.begin()
    clock.run(2 * round_trip_s + 0.01)
    for number, image in enumerate(images):
        current[0] = number
        backend.submit("classifier", image[None], lambda reply: None)
        clock.run(clock.time() + options.deadline_s + round_trip_s)
    return pixels, asked, backend.bytes_sent


def own_work(images: PixelArray, form: JpegForm) -> list[dict[str, Any]]:
    """Times what either end does for an image beside its model: the median of the images, and what parts it has."""
    seal, times = Seal(bytes(32)), np.zeros((len(images), 6))
    places: tuple[tuple[int, ...], ...]
    for number, image in enumerate(images):
        marks = [time.perf_counter()]
        intervals = form.encode(image)
        marks.append(time.perf_counter())
        bodies, _ = laid_out(intervals, form.columns, _PAYLOAD, 0.0)
        packets = [
            seal.close(ImagePacket(PacketKind.DATA, number, index, len(bodies), 500, body))
            for index, body in enumerate(bodies)
        ]
        marks.append(time.perf_counter())
        places, found = interval_numbers(form.columns, form.count, len(packets)), {}
        for data in packets[1:]:  # one is lost
            packet = seal.open(data)
            found.update(read_intervals(packet.body, places[packet.index]))
        marks.append(time.perf_counter())
        pixels, known = form.decode([found.get(one) for one in range(form.count)])
        marks.append(time.perf_counter())
        conceal(pixels, known, form.side)
        marks.append(time.perf_counter())
        times[number] = [*np.diff(marks), marks[-1] - marks[0]]
    names = ("code as JPEG", "lay out and seal", "open and read", "decode", "conceal", "all, both ends")
    return [
        {"part": name, "median_us": float(np.median(column)) * 1e6, "p95_us": float(np.quantile(column, 0.95)) * 1e6}
        for name, column in zip(names, times.T, strict=True)
    ]


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=int, default=90, help="Of JPEG.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--payload", type=int, default=_PAYLOAD, help="Bytes of a packet.")
    parser.add_argument("--card", type=Path, default=card_path("cifar10-base"), help="Another classifier of bytes.")
    parser.add_argument("--images", type=Path, help="Other images, with labels that are numbers of its classes.")
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    card = load_card(given.card)
    if given.images is None:
        with np.load(IMAGES) as file:
            images, labels = file["images"], file["labels"]
    else:
        read = read_images(given.images, height=card.height, width=card.width, split=given.split, limit=given.limit)
        images, labels = read.pixels, read.labels
    session = open_session(given.card.parent / card.file)
    form = JpegForm(card.height, card.width, given.quality)

    def row(method: str, round_trip_s: float, share: float, burst: float) -> dict[str, Any]:
        options = LossyOptions(payload=given.payload, wait_s=_WAIT_S, deadline_s=0.2, **_METHODS[method])
        pixels, asked, sent = seen(images, form, options, round_trip_s, share, burst, given.seed)
        answers = session.run(None, {session.get_inputs()[0].name: pixels})[0].argmax(1)
        right = int(((answers == labels) & np.array(asked)).sum())
        accuracy = exact_share(right, len(labels))
        return {
            "method": method, "loss": share, "burst": burst, "round_trip_over_wait": round_trip_s / _WAIT_S,
            "accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
            "not_asked": 1 - sum(asked) / len(asked), "bytes_per_image": sent / len(images),
        }  # fmt: skip

    by_loss = [row("concealment", 0.01, 0.0, 1.0)] + [
        row(method, 0.01, share, burst)
        for burst in (1.0, _BURST)
        for share in (0.1, 0.3, 0.6)
        for method in ("no concealment", "concealment", "parity 1/4", "sent again")
    ]
    columns = {
        "method": ("method", ""), "loss": ("loss", ".0%"), "burst": ("burst", ".0f"),
        "round_trip_over_wait": ("round trip / wait", ".1f"), "accuracy": ("accuracy", ".3f"),
        "accuracy_low": ("from", ".3f"), "accuracy_high": ("to", ".3f"), "not_asked": ("never seen", ".1%"),
        "bytes_per_image": ("bytes/image", ",.0f"),
    }  # fmt: skip
    show("Accuracy by loss (round trip a fifth of the wait)", by_loss, columns)
    by_time = [
        row(method, ratio * _WAIT_S, 0.3, 1.0)
        for ratio in (0.1, 0.3, 0.6, 0.9, 1.5)
        for method in ("concealment", "sent again, no concealment", "sent again")
    ]
    show("30 % loss: sending again against concealing, by round trip", by_time, columns)
    work = own_work(images, form)
    show("Own work for an image", work, {"part": ("part", ""), "median_us": ("median us", ".0f"),
                                         "p95_us": ("p95 us", ".0f")})  # fmt: skip
    arguments = {"quality": given.quality, "seed": given.seed, "card": card.name, "payload": given.payload}
    write_json(given.json, arguments, [*by_loss, *by_time, *work])


if __name__ == "__main__":
    main()
