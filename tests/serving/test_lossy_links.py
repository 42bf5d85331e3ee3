"""Gateways at both ends of a link that loses packets: what is promised for images that came in part."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evenkeel.arrays import Array
from evenkeel.backends.backend import OnReply, Reply
from evenkeel.backends.fake import FakeBackend
from evenkeel.backends.lossy.server import LossyImage
from evenkeel.clock import Clock, LoopClock, VirtualClock
from evenkeel.coding.answers import Cascade, ScoreForm
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.shipped import card_path
from evenkeel.promises.certificate import Certificate
from evenkeel.promises.promise import Promise
from evenkeel.promises.thresholds import Threshold
from evenkeel.serving.config import LossyConfig, ServeConfig, read_config
from evenkeel.serving.gateway.gateway import Gateway, Options, Outcome
from evenkeel.serving.gateway.item import NO_OPTIONS
from evenkeel.serving.gateway.policy import preset
from evenkeel.serving.gateway.promise_gate import PromiseGate
from evenkeel.serving.lossy import listen_for_images, lossy_backend
from evenkeel.serving.metrics import Metrics
from lossy_helpers import picture

CARD = replace(load_card(card_path("cifar10-base")), classes=("dark", "bright"))
AGREE = Promise("min_agreement", 0.8)
MADE_S = 1_800_000_000.0


def certificate(**thresholds: float) -> Certificate:
    """Keeps `AGREE` with one threshold for each bucket of loss, `b0` to `b5`."""
    found = [Threshold(AGREE, int(name[1]), one, 5000, 0.2, 0.22, 0.15, 0.2) for name, one in thresholds.items()]
    digests = {"light": "onnx:aa", CARD.name: "onnx:bb"}
    return Certificate(
        "cascade", "light", CARD.name, digests, "max_probability", 1.0, tuple(found), MADE_S, MADE_S + 1e6
    )  # fmt: skip


def answer(model: str, inputs: Array) -> Array:
    """Says "dark" or "bright": the light model is as sure as the first pixel / 255, the accurate one by the mean."""
    if model == "light":
        sure = np.clip(inputs.reshape(len(inputs), -1)[:, 0] / 255.0, 0.501, 0.999)
        logit = np.log(sure / (1 - sure))
        return np.stack([logit, 0 * logit], axis=1).astype(np.float32)
    bright = inputs.reshape(len(inputs), -1).mean(1) / 10
    return np.stack([0 * bright, bright], axis=1).astype(np.float32)


class InPart(FakeBackend):
    """Replies as to an image of which a share was lost."""

    def __init__(self, clock: Clock, lost: float) -> None:
        super().__init__("replica", clock, answer)
        self.lost = lost

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        return super().submit(model, inputs, lambda reply: on_reply(replace(reply, lost=self.lost)), key)


def cascade(clock: Clock, replicas: list[Any], promised: Certificate) -> Gateway:
    gate = PromiseGate(promised, AGREE, time_s=clock.time, wall_s=lambda: MADE_S, audit_share=1.0)
    return Gateway(
        clock, CARD.name, replicas, [FakeBackend("edge", clock, answer)],
        [Cascade(8, ScoreForm(2), model="light")], preset("cascade", deadline_s=5.0),
        scores=ScoreForm(2), promises=gate,
    )  # fmt: skip


def image(sure: float) -> Array:
    pixels = picture(1, CARD.height, CARD.width)
    pixels[0, 0] = round(255 * sure)
    return pixels


def asked(lost: float, sure: float, options: Options = NO_OPTIONS, **thresholds: float) -> tuple[Outcome, Gateway]:
    clock, outcomes = VirtualClock(), list[Outcome]()
    gateway = cascade(clock, [InPart(clock, lost)], certificate(**thresholds))
    gateway.submit(image(sure), outcomes.append, options)
    clock.run()
    return outcomes[-1], gateway


def seen(outcome: Outcome) -> tuple[str, bool]:
    assert outcome.answer is not None
    return outcome.answer.source, bool(outcome.certificate)


@pytest.mark.parametrize(
    ("lost", "thresholds", "expected"),
    [
        (0.0, {"b0": 0.9, "b4": 0.6}, ("exact", True)),
        (0.15, {"b0": 0.9, "b4": 0.8}, ("concealed", True)),
        (0.15, {"b0": 0.9, "b4": 0.6}, ("edge", True)),  # at that loss the light model would have answered
        (0.15, {"b0": 0.9}, ("concealed", False)),
        (0.15, {"b0": 0.9, "b3": 0.6}, ("concealed", False)),
        (0.15, {"b0": 0.9, "b4": 0.95}, ("concealed", False)),  # surer items were answered that should not have been
    ],
)
def test_what_reached_a_replica_in_part_is_answered_by_the_threshold_of_that_loss(lost, thresholds, expected) -> None:
    outcome, gateway = asked(lost, 0.7, **thresholds)
    assert seen(outcome) == expected
    # Audits compare with what the accurate model says of whole images.
    assert gateway.stats.audits == (lost == 0)


def test_an_exact_answer_is_of_the_whole_image() -> None:
    outcome, gateway = asked(0.15, 0.7, Options(exact=True), b0=0.9)
    assert isinstance(outcome.error, BackendError)
    assert gateway.stats.lost_attempts >= 1


class UdpRelay(asyncio.DatagramProtocol):
    """Stands between a client and a server on loopback, and loses what `lose` says; greetings pass."""

    def __init__(self, server: tuple[str, int], lose: Callable[[bytes], bool]) -> None:
        self.server, self.lose = server, lose
        self.client: Any = None
        self.lost = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if addr != self.server:
            self.client = addr
        if data[0] > 5 and self.lose(data):
            self.lost += 1
        else:
            self.transport.sendto(data, self.client if addr == self.server else self.server)


async def outcome_of(gateway: Gateway, item: Array, options: Options = NO_OPTIONS) -> Outcome:
    done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    gateway.submit(item, done.set_result, options)
    return await asyncio.wait_for(done, 20)


def linked(
    test: Callable[[Gateway, Gateway, UdpRelay], Any], loss: float, tmp_path, wait_s: float, retransmit: bool
) -> None:
    """Runs a test of an edge's gateway, the data centre's, and a relay between both that loses packets."""
    key = tmp_path / "key"
    key.write_bytes(b"0123456789abcdef")
    key.chmod(0o600)
    config = ServeConfig(
        lossy=LossyConfig(
            listen="udp://127.0.0.1:0",
            key_file=str(key),
            payload=100,
            quality=90,
            wait_s=wait_s,
            deadline_s=4.0,
            retransmit=retransmit,
        )
    )

    async def run() -> None:
        loop, chance = asyncio.get_running_loop(), random.Random(1)
        clock = LoopClock(loop)
        far = Gateway(clock, CARD.name, [FakeBackend("full", clock, answer)], scores=ScoreForm(2))
        server, listening = await listen_for_images(config, far, CARD, "onnx:bb")
        transport, relay = await loop.create_datagram_endpoint(
            lambda: UdpRelay(listening.get_extra_info("sockname"), lambda data: chance.random() < loss),
            local_addr=("127.0.0.1", 0),
        )
        port = transport.get_extra_info("sockname")[1]
        backend = lossy_backend(config, "replica-0", f"udp://127.0.0.1:{port}", CARD, "onnx:bb")
        other = lossy_backend(config, "other", f"udp://127.0.0.1:{port}", CARD, "onnx:cc")
        try:
            await backend.start()
            near = cascade(clock, [backend], certificate(b0=0.9, b1=0.9, b2=0.9, b3=0.9, b4=0.9, b5=0.9))
            await test(near, far, relay)
            shown = Metrics([], lambda: {("toy", backend.name): backend.counts})().decode()
            assert 'evenkeel_lossy_total{model="toy",end="replica-0",what="sent"}' in shown
            # The other end holds another model under this name.
            other.options = replace(other.options, heartbeat_s=0.05)
            with pytest.raises(BackendLostError, match="refused: another"):
                await other.start()
        finally:
            await asyncio.gather(backend.close(), other.close())
            server.close()
            for one in (listening, transport):
                one.close()

    asyncio.run(run())


def test_an_edge_is_answered_over_a_link_that_loses_packets(tmp_path) -> None:
    async def test(near: Gateway, far: Gateway, relay: UdpRelay) -> None:
        sources = []
        for _ in range(12):
            outcome = await outcome_of(near, image(0.7))
            assert outcome.error is None
            assert outcome.answer is not None
            sources.append(outcome.answer.source)
            assert outcome.certificate
            assert int(np.argmax(outcome.answer.value)) == 1  # of the accurate model; the light one says 0
        assert relay.lost > 12
        assert sources.count("concealed") >= 6
        assert far.stats.items == 12
        assert seen(await outcome_of(near, image(0.95))) == ("edge", True)
        assert far.stats.items == 12

    linked(test, 0.3, tmp_path, wait_s=0.2, retransmit=False)


def test_what_is_lost_is_sent_again_and_the_answer_is_exact(tmp_path) -> None:
    async def test(near: Gateway, far: Gateway, relay: UdpRelay) -> None:
        for _ in range(6):
            assert seen(await outcome_of(near, image(0.7), Options(exact=True))) == ("exact", False)
        assert relay.lost > 0

    linked(test, 0.1, tmp_path, wait_s=2.0, retransmit=True)


def test_a_camera_s_image_is_asked_with_the_share_of_it_that_was_lost() -> None:
    clock, outcomes = VirtualClock(), list[Reply]()
    gateway = cascade(clock, [FakeBackend("full", clock, answer)], certificate(b0=0.6, b4=0.8))

    async def images() -> None:
        config = ServeConfig(lossy=LossyConfig(listen="udp://127.0.0.1:0"))
        server, transport = await listen_for_images(config, gateway, CARD)
        for lost, exact in ((0.0, False), (0.15, False), (0.0, True), (0.4, False)):
            server._answer(LossyImage(CARD.name, image(0.7), lost, exact), outcomes.append)
            clock.run()
        small = np.zeros((8, 8, 3), np.uint8)
        server._answer(LossyImage(CARD.name, small, 0.0), outcomes.append)
        transport.close()

    asyncio.run(images())
    light, accurate, exact, unpromised, refused = outcomes
    assert light.outputs is not None
    assert accurate.outputs is not None
    assert exact.outputs is not None
    assert [int(one.argmax()) for one in (light.outputs, accurate.outputs, exact.outputs)] == [0, 1, 1]
    assert "cannot be shown" in str(unpromised.error)
    assert "takes 32 x 32 pixels, found 8 x 8" in str(refused.error)


def test_the_configuration_names_links_and_how_images_cross_them(tmp_path) -> None:
    config = read_config({"replicas": ["udp://10.0.0.9:7000", "tcp://10.0.0.7:7000"], "lossy": {"wait": "80ms"}})
    assert (config.replicas.links, config.replicas.addresses) == (("udp://10.0.0.9:7000",), ("tcp://10.0.0.7:7000",))
    assert config.lossy == LossyConfig(wait_s=0.08)
    with pytest.raises(ConfigurationError, match="same key"):
        lossy_backend(config, "replica-0", "udp://10.0.0.9:7000", CARD)
    floats: ModelCard = replace(CARD, datatype="FP32")
    with pytest.raises(ConfigurationError, match="carries UINT8 pixels, and 'cifar10-base' takes FP32"):
        lossy_backend(config, "replica-0", "udp://127.0.0.1:7000", floats)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"replicas": ["udp://nowhere"]}, r"replicas\[0\]: address 'udp://nowhere': expected udp://host:port"),
        ({"backups": ["udp://127.0.0.1:7000"]}, "backups: no link"),
        ({"lossy": {"listen": "tcp://127.0.0.1:1"}}, r"lossy\.listen: .* expected udp://host:port"),
        ({"lossy": {"payload": 99}}, r"lossy\.payload: expected a whole number from 100 to 1200"),
        ({"lossy": {"wait": "1s"}}, r"lossy\.wait"),
        ({"lossy": {"loss": 1}}, r"lossy\.loss: unknown field"),
    ],
)
def test_links_that_make_no_sense_are_refused_by_name(raw, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_config(raw)
