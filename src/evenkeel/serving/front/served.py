"""Holds the models that a server serves, for its front ends: each with its gateway, reader, decoder and writer.

A front end looks a model up for each request, and goes on with the one that it found, also when another one is put in
its place meanwhile: so a request is read, answered and written by one version.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from evenkeel.errors import UnknownModelError
from evenkeel.models.cards import ModelCard
from evenkeel.oip import shown
from evenkeel.serving.front.answers import OUTPUTS, PROMISED, AnswerWriter
from evenkeel.serving.front.flight import Submits
from evenkeel.serving.front.images import ImageDecoder
from evenkeel.serving.front.items import ItemReader
from evenkeel.serving.front.request_times import RequestTimes
from evenkeel.serving.front.shares import FairShares

__all__ = ["ServedModel", "ServedModels"]


class ServedModel:
    """Holds all that front ends need of one version of one model.

    Args:
        name: as clients call it.
        version: of the model.
        card: of the model.
        gateway: answers items; must live on the event loop of the front ends.
        digest: of the model's file; empty where it is not known.
        promised: answers say by which way they came, and of which certificate's promise they are part.
        decode_processes: image files that are decoded at once.
        decode_bytes: of image files and what decoding them takes, of all requests together.

    Attributes:
        items: reads the items of a request.
        answers: writes the response.
        outputs: name -> datatype, of what it writes.
        decoder: decodes image files.
        times: of its requests.
        shares: decides whom to refuse while the gateway is full.
        held: requests that found this model and have not handed their items to its gateway yet; see `hold`.
    """

    def __init__(
        self,
        name: str,
        version: str,
        card: ModelCard,
        gateway: Submits,
        *,
        digest: str = "",
        promised: bool = False,
        decode_processes: int = 2,
        decode_bytes: int = 1 << 30,
    ) -> None:
        self.name = name
        self.version = version
        self.card = card
        self.gateway = gateway
        self.digest = digest
        self.outputs = {**OUTPUTS, **PROMISED} if promised else OUTPUTS
        self.items = ItemReader(card)
        self.answers = AnswerWriter(name, version, card.classes, promised=promised)
        self.decoder = ImageDecoder(card, processes=decode_processes, max_bytes=decode_bytes)
        self.shares = FairShares(lambda: gateway.in_flight, time.monotonic)
        self.times = RequestTimes()
        self.held = 0

    @property
    def in_use(self) -> bool:
        """Tells whether a request still needs its gateway."""
        return bool(self.held or self.gateway.in_flight)

    def hold(self) -> None:
        """Keeps its gateway open for a request whose items come later than at once, until `release`."""
        self.held += 1

    def release(self, _: object = None) -> None:
        """Ends a `hold`; takes an argument, so that it can be a task's callback."""
        self.held -= 1

    def metadata(self) -> dict[str, Any]:
        """Gives what the protocol says of a model."""
        card = self.card
        columns = {"scores": [-1, len(card.classes)]}
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": "evenkeel",
            **({"digest": self.digest} if self.digest else {}),
            "inputs": [
                {
                    "name": card.input_name,
                    "datatype": card.datatype,
                    "shape": [-1, *card.input_shape],
                    "parameters": {"minimum": 0, "maximum": 255},
                }
            ],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": columns.get(name, [-1])}
                for name, datatype in self.outputs.items()
            ],
        }

    def close(self) -> None:
        """Ends the processes that decode."""
        self.decoder.close()


class ServedModels:
    """Finds the model that a request names; models come and go.

    Attributes:
        draining: a shutdown has begun.
    """

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._models: dict[str, ServedModel] = {}
        self._followers: list[Callable[[], object]] = []
        self.draining = False
        for model in models:
            self.put(model)

    def __iter__(self) -> Iterator[ServedModel]:
        """Gives the models, in the order in which they came."""
        return iter(list(self._models.values()))

    @property
    def ready(self) -> bool:
        """Tells whether every model can answer, and no shutdown has begun."""
        return not self.draining and bool(self._models) and all(one.gateway.ready for one in self._models.values())

    def follow(self, follower: Callable[[], object]) -> None:
        """Calls `follower` now, and whenever models come or go from now on: at once, before any further request."""
        self._followers.append(follower)
        follower()

    def put(self, model: ServedModel) -> ServedModel | None:
        """Serves a model from now on; gives the one of its name that it replaces, which goes on with what it has."""
        before = self._models.get(model.name)
        self._models[model.name] = model
        if self.draining:
            model.gateway.start_draining()
        self._tell()
        return before

    def remove(self, name: str) -> ServedModel:
        """Serves a model no longer, and gives it; it goes on with what it has.

        Raises:
            UnknownModelError: there is none of that name.
        """
        model = self.find(name)
        del self._models[name]
        self._tell()
        return model

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """Gives the model of that name, and of that version if one is given.

        Raises:
            UnknownModelError: there is none.
        """
        model = self._models.get(name)
        if model is None:
            served = ", ".join(map(repr, self._models)) or "no model at the moment"
            raise UnknownModelError(f"unknown model {shown(name)}; this server serves {served}")
        if version is not None and version != model.version:
            raise UnknownModelError(f"model {name!r} has no version {shown(version)}; it has version {model.version!r}")
        return model

    def start_draining(self) -> None:
        """Reports not ready from now on."""
        self.draining = True
        for model in self:
            model.gateway.start_draining()

    def _tell(self) -> None:
        for follower in self._followers:
            follower()
