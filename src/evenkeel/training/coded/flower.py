"""Runs coded training on Flower: nodes are devices, and a round ends as soon as the replies decode.

Flower has no channel from node to node, so that blocks go through the server: it fetches what a new block is made of
and sends it along with the request. Their bytes count twice. Everything else is the coordinator's, over one more
link.

Flower is optional, and wants other versions than `constraints.txt` says: install it with
`examples/flower/constraints.txt`.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import EvenkeelError, MissingExtraError
from evenkeel.training.coded.coordinator import CodedSettings, CodeMaker, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import DeviceEvent, DeviceLink
from evenkeel.training.coded.messages import DeviceMessage, size_bytes
from evenkeel.training.coded.training import CodedModel, TrainingPlan, train

try:
    import flwr.app as flower
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy
except ModuleNotFoundError as error:
    raise MissingExtraError("Flower", "flower") from error

__all__ = ["CodedStrategy", "FlowerDevices", "coded_client"]

_POLL_S = 0.02
_LOOK_S = 1.0  # how often it is looked which nodes are there


class FlowerDevices(DeviceLink):
    """Drives Flower's nodes as devices.

    Args:
        grid: of the ServerApp.
        ttl_s: how long Flower keeps a message.
    """

    def __init__(self, grid: Grid, ttl_s: float = 3600.0) -> None:
        self._grid, self._ttl_s = grid, ttl_s
        self._nodes: dict[str, int] = {}
        self._greeted: set[int] = set()
        self._open: dict[str, tuple[int, DeviceMessage]] = {}
        self._builds: list[_RelayedBuild] = []
        self._events: deque[DeviceEvent] = deque()
        self._looked_s = float("-inf")
        self._tickets = 0

    def time(self) -> float:
        """Gives monotonic seconds."""
        return time.monotonic()

    def send(self, device: str, message: DeviceMessage) -> None:
        """Sends a request; one for a new block waits until its parts are here."""
        node = self._nodes.get(device)
        if node is None:
            return
        if message.kind != "build":
            self._push(node, message)
            return
        build = _RelayedBuild(device, message)
        for address, block, version, _ in message.fields["parts"]:
            if address:
                fields = {"training": message.fields["training"], "block": block, "version": version}
                holder = self._nodes.get(address)
                if holder is not None:
                    build.wanted[self._push(holder, DeviceMessage("fetch", fields))] = block
        self._builds.append(build)
        self._send_complete()

    def poll(self, until_s: float) -> list[DeviceEvent]:
        """Waits for replies, and looks now and then which nodes are there."""
        while True:
            self._look()
            if self._open:
                for reply in self._grid.pull_messages(list(self._open)):
                    self._take(reply)
            if self._events or time.monotonic() >= until_s:
                break
            time.sleep(min(_POLL_S, max(0.0, until_s - time.monotonic())))
        events = list(self._events)
        self._events.clear()
        return events

    def drop(self, device: str, reason: str) -> None:
        """Asks a node nothing any more."""
        node = self._nodes.pop(device, None)
        self._open = {number: request for number, request in self._open.items() if request[0] != node}

    def close(self) -> None:
        """Asks nobody anything any more."""
        self._nodes.clear()
        self._open.clear()

    def _push(self, node: int, message: DeviceMessage) -> str:
        self.sent_bytes += size_bytes(message)
        packed = flower.Message(
            content=_packed(message), dst_node_id=node, message_type="train", ttl=self._ttl_s, group_id="coded"
        )
        number = str(next(iter(self._grid.push_messages([packed]))))
        self._open[number] = (node, message)
        return number

    def _look(self) -> None:
        if time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        there = set(self._grid.get_node_ids())
        for name in [name for name, node in self._nodes.items() if node not in there]:
            self._lose(name, "Flower no longer has its node")
        self._greeted &= there
        for node in there - self._greeted:
            self._greeted.add(node)
            self._push(node, DeviceMessage("hello"))

    def _take(self, reply: Any) -> None:
        number = str(reply.metadata.reply_to_message_id)
        node, request = self._open.pop(number, (0, DeviceMessage("")))
        name = next((name for name, each in self._nodes.items() if each == node), "")
        if reply.has_error():
            if name:
                self._lose(name, str(reply.error.reason))
            return
        message = _unpacked(reply.content)
        self.received_bytes += size_bytes(message)
        if request.kind == "hello":
            name = str(message.fields.get("name"))
            self._nodes[name] = node
            self._events.append(DeviceEvent("joined", name, message))
        elif request.kind == "fetch":
            for build in self._builds:
                if number in build.wanted:
                    build.found[build.wanted.pop(number)] = message
            self._send_complete()
        elif name:
            self._events.append(DeviceEvent("message", name, message))

    def _lose(self, name: str, why: str) -> None:
        self.drop(name, why)
        self._events.append(DeviceEvent("lost", name, DeviceMessage("lost", {"text": why})))

    def _send_complete(self) -> None:
        """Sends the builds whose parts are all here, or will never be: then the node says what is missing."""
        for build in [each for each in self._builds if not each.wanted.keys() & self._open.keys()]:
            self._builds.remove(build)
            arrays = dict(build.request.arrays)
            for block, found in build.found.items():
                arrays |= {f"relayed:{block}:{name}": array for name, array in found.arrays.items()}
            node = self._nodes.get(build.device)
            if node is not None:
                self._push(node, DeviceMessage("build", build.request.fields, arrays))


class _RelayedBuild:
    """Holds a request for a new block whose parts are on their way to the server."""

    def __init__(self, device: str, request: DeviceMessage) -> None:
        self.device, self.request = device, request
        self.wanted: dict[str, str] = {}  # number of the message that asks for it -> block
        self.found: dict[str, DeviceMessage] = {}


def coded_client(make: Callable[[Any], Device]) -> ClientApp:
    """Gives the ClientApp of a node.

    Args:
        make: makes the node's device of Flower's context. It is called for each message, since Flower may run each in a
            process of its own: the device's store must be a folder.
    """
    app = ClientApp()

    @app.train()
    def answer(message: Any, context: Any) -> Any:
        request = _unpacked(message.content)
        device = make(context)
        device.address = device.name
        if request.kind == "hello":
            reply = device.hello()
        else:
            relayed: dict[str, dict[str, Array]] = {}
            for name in [name for name in request.arrays if name.startswith("relayed:")]:
                _, block, part = name.split(":")
                relayed.setdefault(block, {})[part] = request.arrays[name]

            def fetch(address: str, request: DeviceMessage) -> DeviceMessage:
                block = request.text("block")
                if block not in relayed:
                    raise EvenkeelError(f"block {block} of {address} did not come with the request")
                return DeviceMessage("block", arrays=relayed[block])

            device.connect(fetch)
            reply = device.answer(request)
        return flower.Message(content=_packed(reply), reply_to=message)

    return app


class CodedStrategy(Strategy):
    """Trains with exact gradients: a round ends as soon as the replies decode, and nobody's part is left out.

    Args:
        devices: nodes that take part from the beginning.
        code: makes the code.
        plan: what is minimized, and how.
        settings: how devices are treated.

    Attributes:
        model: what the training came to.
    """

    def __init__(
        self, devices: int, code: CodeMaker, plan: TrainingPlan, settings: CodedSettings | None = None
    ) -> None:
        self._devices, self._code, self._plan, self._settings = devices, code, plan, settings
        self.model: CodedModel | None = None

    def start(self, grid: Grid, *arguments: Any, **options: Any) -> Result:
        """Trains, and gives the weights as Flower's result; `timeout` is how long to wait for nodes."""
        coordinator = Coordinator(FlowerDevices(grid), self._code, self._settings)
        coordinator.set_up(self._devices, float(options.get("timeout", 60.0)))
        self.model = train(coordinator, self._plan)
        return Result(arrays=flower.ArrayRecord({"weights": flower.Array(self.model.weights)}))

    def configure_train(self, *arguments: Any) -> Iterable[Any]:
        """Gives no messages: rounds are the coordinator's."""
        return []

    def configure_evaluate(self, *arguments: Any) -> Iterable[Any]:
        """Gives no messages: a round's value is exact already."""
        return []

    def aggregate_train(self, *arguments: Any) -> Any:
        """Gives nothing: gradients are added by the coordinator."""
        return None, None

    def aggregate_evaluate(self, *arguments: Any) -> Any:
        """Gives nothing."""
        return None

    def summary(self) -> None:
        """Says nothing: the plan says it all."""


def _packed(message: DeviceMessage) -> Any:
    arrays = {name: flower.Array(np.ascontiguousarray(value)) for name, value in message.arrays.items()}
    said = flower.ConfigRecord({"kind": message.kind, "fields": json.dumps(dict(message.fields))})
    return flower.RecordDict({"said": said, "arrays": flower.ArrayRecord(arrays)})


def _unpacked(content: Any) -> DeviceMessage:
    said = content["said"]
    arrays = {name: array.numpy() for name, array in content["arrays"].items()}
    return DeviceMessage(str(said["kind"]), json.loads(said["fields"]), arrays)
