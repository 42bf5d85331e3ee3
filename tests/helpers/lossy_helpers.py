"""What the tests of the lossy transport share: pictures, a relay with loss, both ends on a virtual clock."""

import random
from collections.abc import Callable, Hashable

import numpy as np

from evenkeel.backends.backend import Reply
from evenkeel.backends.lossy.backend import DatagramLink, LossyBackend, LossyOptions
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.server import LossyImage, LossyServer, ServerLimits
from evenkeel.clock import VirtualClock

KEY = b"sixteen bytes and more"


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth waves with noise: uint8 [height, width, 3]."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(chance.uniform(0.02, 0.1) * x + chance.uniform(0.02, 0.1) * y + chance.uniform(0, 6)) for _ in range(3)
    ]
    noisy = 128 + 90 * np.stack(waves, axis=-1) + chance.normal(0, 6, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


class Relay(DatagramLink):
    """Carries datagrams after a delay, and loses some: which ones, `lose(way, number, data)` says."""

    where = "relay"

    def __init__(self, clock: VirtualClock, delay_s: float, lose: Callable[[str, int, bytes], bool]) -> None:
        self.clock, self.delay_s, self.lose = clock, delay_s, lose
        self.to_server: Callable[[bytes, Hashable], object] = lambda data, peer: None
        self.to_client: Callable[[bytes], object] = lambda data: None
        self.there: list[bytes] = []
        self.back: list[bytes] = []

    async def open(self, received: Callable[[bytes], object]) -> None:
        self.to_client = received

    def send(self, data: bytes) -> None:
        self.there.append(data)
        if not self.lose("there", len(self.there) - 1, data):
            self.clock.call_at(self.clock.time() + self.delay_s, self.to_server, data, "camera")

    def answer(self, data: bytes, peer: Hashable) -> None:
        self.back.append(data)
        if not self.lose("back", len(self.back) - 1, data):
            self.clock.call_at(self.clock.time() + self.delay_s, self.to_client, data)


def losing(share: float, seed: int = 0, ways: tuple[str, ...] = ("there", "back")) -> Callable[[str, int, bytes], bool]:
    """Loses each datagram by chance, but none of the greeting."""
    chance = random.Random(seed)
    return lambda way, number, data: data[0] > 5 and way in ways and chance.random() < share


class Ends:
    """A client and a server with a relay between them; the server's model gives the mean of each channel."""

    def __init__(
        self,
        form: JpegForm,
        options: LossyOptions,
        *,
        delay_s: float = 0.005,
        lose: Callable[[str, int, bytes], bool] = lambda way, number, data: False,
        key: bytes = b"",
        limits: ServerLimits | None = None,
        answer: Callable[[LossyImage, Callable[[Reply], object]], object] | None = None,
        layout: str = "NHWC",
    ) -> None:
        self.clock = VirtualClock()
        self.seen: list[LossyImage] = []
        self.relay = Relay(self.clock, delay_s, lose)

        def means(image: LossyImage, on_reply: Callable[[Reply], object]) -> None:
            self.seen.append(image)
            if answer is not None:
                answer(image, on_reply)
            else:
                self.clock.call_soon(on_reply, Reply(image.pixels.mean((0, 1), dtype=np.float32)[None]))

        self.server = LossyServer(means, self.relay.answer, self.clock, {"means": ""}, key, limits)
        self.relay.to_server = self.server.received
        self.backend = LossyBackend(
            "lossy", self.relay, "means", form, options=options, clock=self.clock, layout=layout
        )
        self.relay.to_client = self.backend.received
        self.backend.begin()
        self.run(4 * delay_s + 0.001)

    def run(self, seconds: float) -> None:
        self.clock.run(self.clock.time() + seconds)

    def ask(self, *images: np.ndarray, seconds: float = 1.0) -> Reply:
        """Sends images as one task; gives the reply, after checking that there was one."""
        replies: list[Reply] = []
        self.backend.submit("means", np.stack(images), replies.append)
        assert not replies, "replied from inside submit"
        self.run(seconds)
        assert len(replies) == 1
        return replies[0]
