"""Sends images to the data centre in eight ways, on a virtual clock; says what arrived of each, and when.

Five ways are settings of the real lossy transport. TCP and progressive JPEG are models of our own, both kind to what
they model: TCP has an open connection, selective acknowledgements and a window that holds an image; a progressive
image's tables are known at the other end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from evenkeel.arrays import Array, FloatArray, PixelArray
from evenkeel.backends.backend import Reply
from evenkeel.backends.lossy.backend import LossyBackend, LossyOptions
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.packets import OVERHEAD
from evenkeel.backends.lossy.server import LossyImage, LossyServer, ServerLimits
from evenkeel.bench.modeless.links import Link, Relay
from evenkeel.clock import VirtualClock

__all__ = ["METHODS", "Arrived", "Sending", "carried"]

# Name -> how the lossy transport is set; `coarser`: JPEG's quality against the others'. None: a model.
METHODS: Mapping[str, Mapping[str, Any] | None] = {
    "TCP": None,
    "UDP": {"retransmit": False, "conceal": False},
    "concealment": {"retransmit": False},
    "parity": {"retransmit": False, "parity": 0.5},
    "lower quality": {"retransmit": False, "parity": 1.0, "coarser": 2 / 3},
    "progressive": None,
    "NACK": {"conceal": False},
    "NACK + concealment": {},
}
_MODEL = "accurate"
_LEAST_RTO_S = 0.2
_GREY = 128


@dataclass(frozen=True)
class Sending:
    """Says what is sent, the same for all ways.

    Attributes:
        payload: bytes of a packet at most.
        quality: of JPEG.
        per_s: images that are sent in a second, at random moments.
        wait_s: until the data centre must make do with what it has.
        deadline_s: until an image is answered or not at all; TCP has none.
        work_s: of the model there.
        seed: of the moments.
    """

    payload: int
    quality: int
    per_s: float
    wait_s: float
    deadline_s: float
    work_s: float
    seed: int = 1


@dataclass(frozen=True)
class Arrived:
    """Holds what became of the images.

    Attributes:
        pixels: as the model saw them, [n, height, width, 3].
        changed: whether those differ from an image that came whole, [n].
        seconds: until the answer was back, [n]; the deadline where there was none.
        answered: whether one came, [n].
        bytes: on the way there, for each image.
    """

    pixels: PixelArray
    changed: Array
    seconds: FloatArray
    answered: Array
    bytes: float


def carried(method: str, images: PixelArray, link: Link, sending: Sending) -> Arrived:
    """Sends images in one of `METHODS`."""
    gaps = np.random.default_rng(sending.seed).exponential(1.0 / sending.per_s, len(images))
    moments = 1.0 + np.cumsum(gaps)
    if method == "TCP":
        return _by_tcp(images, moments, link, sending)
    if method == "progressive":
        return _progressive(images, moments, link, sending)
    settings = METHODS[method]
    assert settings is not None
    return _by_lossy(images, moments, link, sending, settings)


def _by_lossy(
    images: PixelArray, moments: FloatArray, link: Link, sending: Sending, settings: Mapping[str, Any]
) -> Arrived:
    clock = VirtualClock()
    relay = Relay(clock, link)
    height, width = images.shape[1:3]
    form = JpegForm(width, height, round(sending.quality * settings.get("coarser", 1.0)))
    options = LossyOptions(
        payload=sending.payload, wait_s=sending.wait_s, deadline_s=sending.deadline_s, images=10_000,
        **{name: value for name, value in settings.items() if name != "coarser"},
    )  # fmt: skip
    shown: list[LossyImage] = []

    def answer(image: LossyImage, on_reply: Callable[[Reply], object]) -> None:
        shown.append(image)
        reply = Reply(np.array([[len(shown) - 1]], np.float32))
        clock.call_at(clock.time() + sending.work_s, on_reply, reply)

    server = LossyServer(answer, relay.back, clock, {_MODEL: ""}, limits=ServerLimits(images=10_000))
    backend = LossyBackend("camera", relay, _MODEL, form, options=options, clock=clock)
    relay.to_server, relay.to_client = server.received, backend.received
    backend.begin()
    clock.run(moments[0] / 2)
    seconds = np.full(len(images), sending.deadline_s)
    pixels, changed = np.full_like(images, _GREY), np.ones(len(images), bool)
    answered = np.zeros(len(images), bool)

    def done(place: int, reply: Reply) -> None:
        if reply.outputs is not None:
            image = shown[int(reply.outputs[0, 0])]
            seconds[place] = clock.time() - moments[place]
            pixels[place], answered[place] = image.pixels, True
            changed[place] = bool(image.lost) or form.quality != sending.quality

    for place, moment in enumerate(moments):
        clock.call_at(moment, partial(backend.submit, _MODEL, images[place : place + 1], partial(done, place)))
    clock.run(moments[-1] + sending.deadline_s + 1)
    return Arrived(pixels, changed, seconds, answered, relay.bytes_there / len(images))


def _whole(images: PixelArray, quality: int) -> PixelArray:
    form = JpegForm(images.shape[2], images.shape[1], quality)
    return np.stack([form.decode(form.encode(image))[0] for image in images])


def _coded(image: PixelArray, sending: Sending, *, progressive: bool) -> tuple[bytes, int]:
    """Gives the file of an image, and where its coded data begin."""
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=sending.quality, subsampling=0, progressive=progressive)
    data = file.getvalue()
    return data, data.index(b"\xff\xda")


def _by_tcp(images: PixelArray, moments: FloatArray, link: Link, sending: Sending) -> Arrived:
    """Models a connection that is open: what is lost is sent again, and nothing overtakes."""
    clock, round_trip_s = VirtualClock(), link.round_trip_s
    relay = Relay(clock, link)
    rto_s = max(_LEAST_RTO_S, 2 * round_trip_s)
    arrivals: list[dict[int, float]] = [{} for _ in images]
    counts = []

    def send(place: int, segment: int, size: int, attempt: int) -> None:
        arrival = relay.arrival(size)
        if arrival is not None:
            arrivals[place][segment] = min(arrival, arrivals[place].get(segment, arrival))
        elif attempt:
            clock.call_at(clock.time() + rto_s * 2 ** (attempt - 1), send, place, segment, size, attempt + 1)

    def probe(place: int, sizes: list[int]) -> None:
        """Sends lost segments again: those with three later ones there at once, others by a probe of the tail."""
        for segment, size in enumerate(sizes):
            if segment not in arrivals[place]:
                later = sorted(when for other, when in arrivals[place].items() if other > segment)
                when = later[2] + round_trip_s / 2 if len(later) > 2 else clock.time() + 2 * round_trip_s
                clock.call_at(when, send, place, segment, size, 1)

    def begin(place: int, sizes: list[int]) -> None:
        for segment, size in enumerate(sizes):
            send(place, segment, size, 0)
        clock.call_soon(probe, place, sizes)

    for place, image in enumerate(images):
        data, start = _coded(image, sending, progressive=False)
        left = len(data) - start
        sizes = [sending.payload] * (left // sending.payload) + [left % sending.payload] * bool(left % sending.payload)
        counts.append(len(sizes))
        clock.call_at(moments[place], begin, place, sizes)
    clock.run()
    seconds, before = np.zeros(len(images)), 0.0
    for place, found in enumerate(arrivals):
        assert len(found) == counts[place]
        before = max(before, *found.values())
        back, tries = before + sending.work_s, 0
        while relay.lost_back():
            back += 2 * round_trip_s if not tries else rto_s * 2 ** (tries - 1)
            tries += 1
        seconds[place] = back + round_trip_s / 2 - moments[place]
    nothing = np.zeros(len(images), bool)
    return Arrived(_whole(images, sending.quality), nothing, seconds, ~nothing, relay.bytes_there / len(images))


def _progressive(images: PixelArray, moments: FloatArray, link: Link, sending: Sending) -> Arrived:
    """Sends scans coarse to fine; of an image that came in part, what stands before the first hole is decoded."""
    clock = VirtualClock()
    relay = Relay(clock, link)
    room = sending.payload - OVERHEAD
    pixels, changed = np.full_like(images, _GREY), np.zeros(len(images), bool)
    seconds, answered = np.full(len(images), sending.deadline_s), np.zeros(len(images), bool)

    def send(place: int) -> None:
        data, start = _coded(images[place], sending, progressive=True)
        parts = [data[at : at + room] for at in range(start, len(data), room)]
        arrivals = [relay.arrival(len(part) + OVERHEAD) for part in parts]
        by = moments[place] + sending.wait_s
        here = [when is not None and when <= by for when in arrivals]
        whole = all(here)
        kept = len(parts) if whole else here.index(False)
        decoded = None if not kept else _decoded(data[: min(len(data), start + kept * room)])
        if decoded is None or relay.lost_back():
            return
        at = max(when for when in arrivals if when is not None) if whole else by
        seconds[place] = at + sending.work_s + link.round_trip_s / 2 - moments[place]
        pixels[place], answered[place], changed[place] = decoded, True, True

    for place, moment in enumerate(moments):
        clock.call_at(moment, send, place)
    clock.run()
    return Arrived(pixels, changed, seconds, answered, relay.bytes_there / len(images))


def _decoded(data: bytes) -> PixelArray | None:
    try:
        with Image.open(BytesIO(data + b"\xff\xd9"), formats=("JPEG",)) as image:
            pixels: PixelArray = np.array(image.convert("RGB"))
            return pixels
    except OSError:
        return None
