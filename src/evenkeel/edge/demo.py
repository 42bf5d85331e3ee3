"""Runs `evenkeel demo edge`: a light model beside the camera, a full one behind a link that delays and loses packets.

All is the real thing, in one process beside the two workers: the gateway, its certificate, the lossy transport. Only
the link is made up: it carries datagrams after a delay, loses some, and is gone for a while.
"""

import asyncio
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from evenkeel.arrays import Array, IntegerArray, PixelArray
from evenkeel.backends.backend import Backend
from evenkeel.backends.lossy.backend import DatagramLink, LossyBackend, LossyOptions
from evenkeel.backends.lossy.conceal import conceal
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.packets import interval_numbers, laid_out, read_intervals
from evenkeel.backends.lossy.server import LossyServer, answered_by
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.clock import LoopClock
from evenkeel.coding.answers.cascade import Cascade
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.edge.demo_figure import DecodedImage, demo_figure
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.figures.estimates import exact_share, quantile
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.figures.tables import Column, Page
from evenkeel.models import shipped
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.promises.certificate import load_certificate
from evenkeel.promises.promise import Promise
from evenkeel.serving.gateway.gateway import Gateway, Outcome
from evenkeel.serving.gateway.policy import Policy, preset
from evenkeel.serving.gateway.promise_gate import PromiseGate

__all__ = ["EdgeDemoArguments", "run_edge_demo"]

_LIGHT, _FULL = "cifar10-light", "cifar10-base"
_QUALITY = 90  # of JPEG
_PAYLOAD = 100  # bytes of a packet, about nine an image: smaller holes than a picture of 32 pixels deserves
_WAIT_OF_DEADLINE = 0.4  # share of the deadline that packets are waited for
_HEARTBEAT_S = 0.2
_SHOWN_LOSS = 0.3  # of the images that are looked at
_SHOWN = 8
_SAMPLE = 3  # numbers of passes before the first request

_LABELS = (Column("who", "who answers"),)
_COLUMNS = (
    Column("right", "right", "%", factor=100),
    Column("p50_ms", "p50", "ms"),
    Column("p95_ms", "p95", "ms"),
    Column("p99_ms", "p99", "ms"),
    Column("cost", "cost", "full passes"),
    Column("sent_bytes", "sent", "B/image"),
    Column("degraded", "degraded", "%", factor=100),
    Column("promised", "promised", "%", factor=100),
)


@dataclass(frozen=True)
class EdgeDemoArguments:
    """Holds the options of `evenkeel demo edge`; `--help` says what each one means."""

    images: int
    rate: float
    loss: float
    delay: float  # one way, milliseconds
    deadline: float  # milliseconds
    seed: int
    outputs: Outputs


class _MadeUpLink(DatagramLink):
    """Carries datagrams both ways after a delay, and loses some of them; all while it is `gone`."""

    where = "the link"

    def __init__(self, clock: LoopClock, delay_s: float, loss: float, seed: int) -> None:
        self._clock, self._delay_s, self._loss = clock, delay_s, loss
        self._random = random.Random(seed)
        self.gone = False
        self.to_server: Callable[[bytes, Hashable], object] = lambda data, peer: None
        self._to_client: Callable[[bytes], object] = lambda data: None

    async def open(self, received: Callable[[bytes], object]) -> None:
        self._to_client = received

    def send(self, data: bytes) -> None:
        self._carry(self.to_server, data, "camera")

    def back(self, data: bytes, peer: Hashable) -> None:
        self._carry(self._to_client, data)

    def _carry(self, to: Callable[..., object], *what: Any) -> None:
        if not self.gone and self._random.random() >= self._loss:
            self._clock.call_at(self._clock.time() + self._delay_s, to, *what)


@dataclass(frozen=True)
class _Answerer:
    """Describes one way to answer."""

    name: str
    light: bool  # a light model is here
    full: bool  # a full one behind the link
    gone: bool = False  # the link is, for the middle third of the images


_ANSWERERS = (
    _Answerer("edge", light=True, full=False),
    _Answerer("data centre", light=False, full=True),
    _Answerer("edge first", light=True, full=True),
    _Answerer("edge first, link gone", light=True, full=True, gone=True),
)


@dataclass(frozen=True)
class _Scene:
    """Holds what all contenders share."""

    light_card: ModelCard
    full_card: ModelCard
    light: Backend
    full: Backend
    pixels: PixelArray
    labels: IntegerArray
    arguments: EdgeDemoArguments


def run_edge_demo(arguments: EdgeDemoArguments) -> None:
    """Runs the demo, and prints a table.

    Raises:
        EvenkeelError: a worker does not start.
    """
    arguments.outputs.check()
    for name, low, high in (("loss", 0.0, 0.9), ("delay", 0.0, 1000.0), ("deadline", 20.0, 10_000.0)):
        if not low <= getattr(arguments, name) <= high:
            raise ConfigurationError(f"{name}: must be from {low:g} to {high:g}, found {getattr(arguments, name):g}")
    promise = Promise("min_accuracy", shipped.PROMISED)
    Console(stderr=True).print(
        f"[bold]A light model here, a full one behind a link[/bold] with {arguments.delay:g} ms of delay each way and "
        f"{arguments.loss:.0%} of the packets lost;\n{arguments.images} CIFAR-10 test images, {arguments.rate:g} a "
        f"second, {arguments.deadline:g} ms for each. Promised: {promise}.\n",
        highlight=False,
    )
    rows, latencies = asyncio.run(_run_all(arguments, promise))
    certificate = load_certificate(shipped.CERTIFICATE)
    kept = certificate.keeping(promise.stricter(shipped.MISSES) or promise)
    assert kept is not None
    calibration = certificate.sizes.get("calibration", kept.n)
    notes = [
        f"certificate {certificate.id}: {kept.promise} from score {kept.threshold:.3f} on, shown on {calibration:,} "
        f"other test images, {kept.offload:.1%} of them for the data centre; the difference leaves room for misses",
        "right: within the deadline, with 95 % interval; cost: passes of the full model an answer, a light one is "
        f"{load_card(shipped.card_path(_LIGHT)).relative_cost:.2f}",
        "promised: answers that name the certificate; link gone: for the middle third, when too many are degraded to "
        "promise anything",
    ]
    publish(
        [Page(rows, _LABELS, _COLUMNS, notes=notes)],
        rows,
        arguments_of(arguments),
        arguments.outputs,
        draw=lambda: demo_figure(rows, latencies, promise.level, arguments.deadline, decoded_images(arguments.seed)),
    )


async def _run_all(
    arguments: EdgeDemoArguments, promise: Promise
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    with np.load(shipped.IMAGES, allow_pickle=False) as file:
        pixels, labels = file["images"], file["labels"]
    order = np.random.default_rng(arguments.seed).permutation(len(pixels))
    order = np.resize(order, arguments.images)
    light_card, full_card = (load_card(shipped.card_path(name)) for name in (_LIGHT, _FULL))
    light, full = (_worker(name) for name in (_LIGHT, _FULL))
    scene = _Scene(light_card, full_card, light, full, pixels[order], labels[order], arguments)
    rows, latencies = [], {}
    try:
        await asyncio.gather(light.start(), full.start())
        for backend, card in ((light, light_card), (full, full_card)):
            for _ in range(_SAMPLE):
                await _pass(backend, card.name, pixels[:1])
        with bars(Console(stderr=True), 24) as progress:
            tasks = {one.name: progress.add_task(one.name, total=len(order), start=False) for one in _ANSWERERS}
            for contender in _ANSWERERS:
                task = tasks[contender.name]
                progress.start_task(task)
                row, latencies[contender.name] = await _run(scene, contender, promise, partial(progress.advance, task))
                rows.append(row)
    finally:
        await asyncio.gather(light.close(), full.close())
    return rows, latencies


def _worker(name: str) -> ProcessBackend:
    config = WorkerConfig(models=(str(shipped.card_path(name)),), listen="tcp://127.0.0.1:0")  # which is not used
    return ProcessBackend(name, config, [name])


async def _pass(backend: Backend, model: str, inputs: Array) -> None:
    done = asyncio.get_running_loop().create_future()
    backend.submit(model, inputs, done.set_result)
    reply = await done
    if reply.error is not None:
        raise EvenkeelError(f"{backend.name}: {reply.error}")


async def _run(
    scene: _Scene, contender: _Answerer, promise: Promise, done: Callable[[], object]
) -> tuple[dict[str, Any], list[float]]:
    """Sends all images to one contender; gives its row, and the latencies of what was answered."""
    arguments, clock = scene.arguments, LoopClock(asyncio.get_running_loop())
    deadline_s = arguments.deadline / 1e3
    link = _MadeUpLink(clock, arguments.delay / 1e3, arguments.loss, arguments.seed)
    side = scene.full_card.width
    options = LossyOptions(
        payload=_PAYLOAD, wait_s=_WAIT_OF_DEADLINE * deadline_s, deadline_s=deadline_s, heartbeat_s=_HEARTBEAT_S
    )
    far = LossyBackend("data-centre", link, _FULL, JpegForm(side, side, _QUALITY), options=options)
    server = LossyServer(answered_by(scene.full), link.back, clock, {_FULL: ""})
    link.to_server = server.received
    outcomes: list[Outcome | None] = [None] * len(scene.pixels)
    gateway = _gateway(scene, contender, clock, far, promise, deadline_s)
    try:
        if contender.full:
            await far.start()
        period_s, began_s = 1 / arguments.rate, clock.time()
        finished = asyncio.Event()
        for number, image in enumerate(scene.pixels):
            await asyncio.sleep(max(0.0, began_s + number * period_s - clock.time()))
            link.gone = contender.gone and len(outcomes) / 3 <= number < 2 * len(outcomes) / 3

            def landed(outcome: Outcome, number: int = number) -> None:
                outcomes[number] = outcome
                done()
                if all(outcomes):
                    finished.set()

            gateway.submit(image, landed)
        await finished.wait()
    finally:
        await far.close()
        server.close()
    asked = far.counts["answered"] + far.counts["unanswered"]
    return _row(scene, contender, [one for one in outcomes if one is not None], asked, far.bytes_sent)


def _gateway(
    scene: _Scene, contender: _Answerer, clock: LoopClock, far: Backend, promise: Promise, deadline_s: float
) -> Gateway:
    form = ScoreForm.from_card(scene.full_card)
    if not contender.full:
        policy: Policy = preset("none", deadline_s=deadline_s)
        return Gateway(clock, _LIGHT, [scene.light], policy=policy, scores=ScoreForm.from_card(scene.light_card))
    if not contender.light:
        return Gateway(clock, _FULL, [far], policy=preset("none", deadline_s=deadline_s), scores=form)
    certificate = load_certificate(shipped.CERTIFICATE)
    code = Cascade(8, ScoreForm(form.classes, certificate.temperature), kind=certificate.score, model=_LIGHT)
    gate = PromiseGate(
        certificate,
        promise,
        light_cost=scene.light_card.relative_cost,
        seed=scene.arguments.seed,
    )
    return Gateway(
        clock, _FULL, [far], [scene.light], [code], preset("cascade", deadline_s=deadline_s, degrade=True),
        scores=form, promises=gate,
    )  # fmt: skip


def _row(
    scene: _Scene, contender: _Answerer, outcomes: Sequence[Outcome], asked: int, sent_bytes: int
) -> tuple[dict[str, Any], list[float]]:
    count = len(outcomes)
    answered = [(one, label) for one, label in zip(outcomes, scene.labels, strict=True) if one.answer is not None]
    latencies = [1e3 * one.latency_s for one, _ in answered]
    hits = sum(int(one.answer.value.argmax()) == int(label) for one, label in answered if one.answer)
    right = exact_share(hits, count)
    row: dict[str, Any] = {
        "who": contender.name,
        "right": right.value, "right_low": right.low, "right_high": right.high,
        "cost": contender.light * scene.light_card.relative_cost + asked / count,
        "sent_bytes": sent_bytes / count,
        "to_data_centre": asked / count,
        "degraded": sum(one.answer is not None and one.answer.source == "degraded" for one in outcomes) / count,
        "promised": sum(bool(one.certificate) for one in outcomes) / count,
        "failed": 1 - len(answered) / count,
    }  # fmt: skip
    for name, level in (("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99)):
        found = quantile(latencies, level)
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row, latencies


def decoded_images(seed: int) -> list[DecodedImage]:
    """Gives some of the shipped images as they were, as they came over a lossy link, and with their holes filled."""
    with np.load(shipped.IMAGES, allow_pickle=False) as file:
        pixels, labels = file["images"], file["labels"]
    classes = load_card(shipped.card_path(_FULL)).classes
    chance = np.random.default_rng(seed)
    form = JpegForm(pixels.shape[2], pixels.shape[1], _QUALITY)
    shown = []
    for place in chance.permutation(len(pixels))[:_SHOWN].tolist():
        bodies, _ = laid_out(form.encode(pixels[place]), form.columns, _PAYLOAD, 0.0)
        places = interval_numbers(form.columns, form.count, len(bodies))
        intervals: list[bytes | None] = [None] * form.count
        for index in np.flatnonzero(chance.random(len(bodies)) >= _SHOWN_LOSS).tolist():
            for number, data in read_intervals(bodies[index], places[index]).items():
                intervals[number] = data
        came, known = form.decode(intervals)
        filled = came.copy()
        conceal(filled, known, form.side)
        shown.append(DecodedImage(classes[labels[place]], pixels[place], came, filled, 1 - float(known.mean())))
    return shown
