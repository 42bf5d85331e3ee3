"""Connects a gateway with links that lose packets: images that cameras send, and replicas at the far end of a link.

An image that came in part is asked with the share that was lost, so that a certificate's threshold for that loss
applies; see `Options.loss` and `PromiseGate.at_loss`.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from evenkeel.backends.backend import Reply
from evenkeel.backends.lossy.backend import LossyBackend, LossyOptions
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.server import LossyImage, LossyServer
from evenkeel.backends.lossy.udp import UdpLink, serve_udp, udp_address
from evenkeel.backends.worker.key import check_open, read_key
from evenkeel.errors import BackendBusyError, BackendError, ConfigurationError, EvenkeelError, TaskRefusedError
from evenkeel.models.cards import ModelCard
from evenkeel.serving.config import ServeConfig
from evenkeel.serving.gateway.gateway import Gateway, Options, Outcome

__all__ = ["listen_for_images", "lossy_backend"]


def lossy_backend(config: ServeConfig, name: str, link: str, card: ModelCard, digest: str = "") -> LossyBackend:
    """Makes the backend that sends items over the link `udp://host:port`.

    Args:
        config: says how.
        name: of the backend.
        link: to a gateway that listens for images.
        card: of the model that is asked there.
        digest: that the model must have there; empty: whichever has its name.

    Raises:
        ConfigurationError: the model takes no bytes as pixels, or the key or an option is wrong.
    """
    lossy = config.lossy
    if card.datatype != "UINT8":
        raise ConfigurationError(f"replicas: {link} carries UINT8 pixels, and {card.name!r} takes {card.datatype}")
    address = udp_address(link)
    key = read_key(lossy.key_file or config.worker_key_file)
    check_open(address, key, lossy.no_key)
    options = LossyOptions(
        payload=lossy.payload,
        wait_s=lossy.wait_s,
        deadline_s=lossy.deadline_s,
        parity=lossy.parity,
        retransmit=lossy.retransmit,
        exact=True,
        key=key,
    )
    form = JpegForm(card.width, card.height, lossy.quality, lossy.subsampling, lossy.blocks)
    called = config.remote_model or config.name or card.name
    udp = UdpLink(address.host, address.port)
    backend = LossyBackend(
        name, udp, card.name, form, layout=card.layout, called=called, digest=digest, options=options
    )  # fmt: skip
    backend.address = link
    return backend


async def listen_for_images(
    config: ServeConfig, gateway: Gateway, card: ModelCard, digest: str = ""
) -> tuple[LossyServer, asyncio.DatagramTransport]:
    """Has the gateway answer images that come to `lossy.listen`, until both results are closed.

    Raises:
        ConfigurationError: the address cannot be had, or others can reach it although there is no key.
    """
    lossy = config.lossy
    address = udp_address(lossy.listen)
    answer = partial(_answer, gateway, card, lossy.deadline_s)
    models: Mapping[str, str] = dict.fromkeys((card.name, config.name or card.name), digest)
    key = read_key(lossy.key_file or config.worker_key_file)
    return await serve_udp(answer, address.host, address.port, models, key=key, no_key=lossy.no_key)


def _answer(
    gateway: Gateway, card: ModelCard, deadline_s: float, image: LossyImage, on_reply: Callable[[Reply], object]
) -> None:
    height, width = image.pixels.shape[:2]
    if (height, width) != (card.height, card.width):
        wanted = f"{card.width} x {card.height} pixels"
        on_reply(Reply(error=TaskRefusedError(f"{card.name} takes {wanted}, found {width} x {height}")))
        return
    pixels = image.pixels if card.layout == "NHWC" else image.pixels.transpose(2, 0, 1)
    item = np.ascontiguousarray(pixels, np.uint8 if card.datatype == "UINT8" else np.float32)
    if gateway.draining:
        on_reply(Reply(error=BackendBusyError("this server is shutting down")))
        return
    options = Options(exact=image.exact, timeout_s=deadline_s, loss=image.lost)
    try:
        gateway.submit(item, partial(_answered, on_reply), options)
    except EvenkeelError as error:  # no room, or nothing can be promised at this loss
        on_reply(Reply(error=BackendError(str(error))))


def _answered(on_reply: Callable[[Reply], object], outcome: Outcome) -> None:
    if outcome.answer is None:
        on_reply(Reply(error=BackendError(str(outcome.error))))
    else:
        on_reply(Reply(outcome.answer.value[None]))
