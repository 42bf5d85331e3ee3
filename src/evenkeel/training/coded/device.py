"""Does a device's work: multiplies its blocks, and makes new ones from its peers' blocks. Knows no sockets and no time.

A device has its own examples, which never change, and coded blocks (`store.py`). It answers one request at a time:

    adopt    take part in a training, with its own examples as a block of that name
    labels   give the labels of a partition
    step     give `X w` of some blocks; with a loss also the gradient of those partitions whose labels it has
    pull     give the sum of `X' v` over some blocks
    build    make a block from multiples of other blocks, got from peers
    fetch    give a block, to a peer
    release  hold the own examples ready no longer: another device has that partition now

A request that it cannot do is answered with `error` and a text; `lacking` then names the blocks that it does not have.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.errors import ConfigurationError, EvenkeelError, ProtocolError
from evenkeel.training.coded.data_files import as_labels
from evenkeel.training.coded.losses import loss_named
from evenkeel.training.coded.matrix import DataMatrix, as_matrix, combine, from_arrays
from evenkeel.training.coded.messages import DeviceMessage, size_bytes
from evenkeel.training.coded.store import BlockStore, HeldBlock, Membership

__all__ = ["OWN_VERSION", "Device", "Fetch", "signed_labels"]

OWN_VERSION = 1  # of a partition: its numbers never change
Fetch = Callable[[str, DeviceMessage], DeviceMessage]
_MAX_PARTS = 4096


class Device:
    """Is one device: its examples, its blocks, and what it answers.

    Args:
        name: by which the coordinator knows it again.
        examples: its own, with one label each; None: it only helps out.
        store: where its coded blocks are kept.
        address: where peers reach it.
        fetch: asks the peer at an address; raises EvenkeelError where that fails.

    Raises:
        ConfigurationError: the name or the examples are of no use; says why.
    """

    def __init__(
        self,
        name: str,
        examples: tuple[Any, Any] | None = None,
        store: BlockStore | None = None,
        *,
        address: str = "",
        fetch: Fetch | None = None,
    ) -> None:
        if not name or len(name) > 100 or not name.isprintable():
            raise ConfigurationError(f"device name {name!r}: use 1 to 100 printable characters")
        self.name, self.address = name, address
        self._store = store or BlockStore()
        self._fetch = fetch
        self._data: DataMatrix | None = None
        self._labels: FloatArray = np.empty(0)
        if examples is not None:
            data = examples[0]
            self._data = data if isinstance(data, DataMatrix) else as_matrix(data, f"device {name}")
            self._labels = as_labels(examples[1], self._data.shape[0], f"device {name}")
        self._digest = _digest(self._data, self._labels)
        self._own: HeldBlock | None = None
        self._outdated: Callable[[], bool] = _never
        self._prepare_own()

    def connect(self, fetch: Fetch) -> None:
        """Gives the function that fetches blocks from peers."""
        self._fetch = fetch

    def hello(self) -> DeviceMessage:
        """Introduces the device: who it is, which examples it has and which blocks it holds."""
        rows, columns = (0, 0) if self._data is None else self._data.shape
        membership = self._store.membership
        fields = {
            "name": self.name,
            "address": self.address,
            "rows": rows,
            "columns": columns,
            "digest": self._digest,
            "training": membership.training,
            "blocks": self._versions(),
        }
        return DeviceMessage("hello", fields)

    def answer(self, request: DeviceMessage, outdated: Callable[[], bool] | None = None) -> DeviceMessage:
        """Does what is asked for and gives the reply; never raises for a request that cannot be done.

        Args:
            request: what is asked for.
            outdated: tells whether nobody waits for the reply any more; asked before each multiplication.
        """
        self._outdated = outdated or _never
        ticket = request.fields.get("ticket", 0)
        handlers = {
            "adopt": self._adopt,
            "labels": self._give_labels,
            "step": self._step,
            "pull": self._pull,
            "build": self._build,
            "fetch": self._give,
            "release": self._release,
        }
        try:
            handler = handlers.get(request.kind)
            if handler is None:
                raise ProtocolError(f"a device is never sent a {request.kind!r} message")
            reply = handler(request)
            return replace(reply, fields={**reply.fields, "ticket": ticket})
        except _LackingError as error:
            return DeviceMessage("error", {"ticket": ticket, "text": str(error), "lacking": error.blocks})
        except EvenkeelError as error:
            return DeviceMessage("error", {"ticket": ticket, "text": str(error), "lacking": []})

    def work(self, request: DeviceMessage) -> float:
        """Gives how much a request multiplies, as a share of an ordinary one: a product of the device's own partition,
        and one of its transpose. 1 for requests that multiply nothing.
        """
        if request.kind not in ("step", "pull") or not isinstance(request.fields.get("blocks"), dict):
            return 1.0
        done = usual = 0.0
        for name, version in request.fields["blocks"].items():
            try:
                block = self._block(name, version)
                rows = _rows(request)
                count = block.matrix.shape[0] if rows is None else len(rows)
                spans = _spans(request, name, count)
            except EvenkeelError:
                return 1.0
            share = 1.0 if spans is None else sum(high - low for low, high in spans) / count
            both = request.fields.get("loss") is not None and block.labels is not None
            done += share * (1 + both) * block.matrix.nonzeros
            usual = max(usual, 2.0 * block.matrix.nonzeros)
        return done / (2.0 * self._own.matrix.nonzeros if self._own is not None else usual)

    def _versions(self) -> dict[str, int]:
        own = {self._store.membership.own: self._own.version} if self._own is not None else {}
        return self._store.versions | own

    def _prepare_own(self) -> None:
        """Holds the device's own examples ready as the block that they are."""
        membership = self._store.membership
        self._own = None
        if membership.own and self._data is not None:
            matrix = self._data.converted(membership.dtype, membership.ones)
            self._own = HeldBlock(OWN_VERSION, matrix, self._labels)

    def _adopt(self, request: DeviceMessage) -> DeviceMessage:
        membership = Membership(
            request.text("training"), request.text("own"), request.text("dtype"), request.fields.get("ones") is True
        )
        if membership.dtype not in ("float32", "float64"):
            raise ProtocolError(f"blocks of {membership.dtype!r}; expected float32 or float64")
        if membership.own and (self._data is None or not membership.own.isalnum()):
            raise ProtocolError(f"device {self.name} has no examples that could be block {membership.own!r}")
        self._store.begin(membership)
        self._prepare_own()
        return DeviceMessage("adopted")

    def _release(self, request: DeviceMessage) -> DeviceMessage:
        self._store.begin(replace(self._store.membership, own=""))
        self._prepare_own()
        return DeviceMessage("released")

    def _block(self, name: object, version: object) -> HeldBlock:
        if self._own is not None and name == self._store.membership.own:
            block = self._own if version == self._own.version else None
        else:
            block = self._store.get(name, version) if isinstance(name, str) and isinstance(version, int) else None
        if block is None:
            raise _LackingError(f"device {self.name} does not hold version {version} of block {name}", [str(name)])
        return block

    def _blocks(self, request: DeviceMessage) -> dict[str, HeldBlock]:
        wanted = request.fields.get("blocks")
        if not isinstance(wanted, dict) or not wanted:
            raise ProtocolError(f"a {request.kind} message without blocks")
        if request.text("training") != self._store.membership.training:
            raise _LackingError(f"device {self.name} takes part in another training", list(wanted))
        return {name: self._block(name, version) for name, version in wanted.items()}

    def _give_labels(self, request: DeviceMessage) -> DeviceMessage:
        if not len(self._labels):
            raise ProtocolError(f"device {self.name} has no examples")
        return DeviceMessage("labels", arrays={"labels": self._labels})

    def _step(self, request: DeviceMessage) -> DeviceMessage:
        blocks = self._blocks(request)
        weights = request.array("w", next(iter(blocks.values())).matrix.shape[1])
        loss = None if request.fields.get("loss") is None else loss_named(request.fields["loss"])
        arrays: dict[str, Array] = {}
        total: Array | None = None
        for name, block in blocks.items():
            self._go_on()
            matrices = _parts(block.matrix, request, name)
            product = _joined([matrix.times(weights).astype(matrix.dtype, copy=False) for matrix in matrices])
            arrays[f"z{name}"] = product
            if loss is not None and block.labels is not None and len(matrices) == 1:
                matrix = matrices[0]
                labels = signed_labels(block.labels, request.fields.get("classes"))
                rows = _rows(request)
                if rows is not None:
                    labels = np.where(rows < len(labels), labels[np.minimum(rows, len(labels) - 1)], 0.0)
                self._go_on()
                slope = loss.slope(product.astype(np.float64), labels)
                if rows is not None:
                    slope[rows >= len(block.labels)] = 0.0
                part = matrix.transposed_times(slope).astype(matrix.dtype, copy=False)
                total = part if total is None else total + part
        if total is not None:
            arrays["gradient"] = total
        return DeviceMessage("products", arrays=arrays)

    def _go_on(self) -> None:
        if self._outdated():
            raise EvenkeelError("a later round has begun")

    def _pull(self, request: DeviceMessage) -> DeviceMessage:
        total: Array | None = None
        for name, block in self._blocks(request).items():
            self._go_on()
            matrices = _parts(block.matrix, request, name)
            vector, place = request.array(f"v{name}", sum(matrix.shape[0] for matrix in matrices)), 0
            for matrix in matrices:
                part = matrix.transposed_times(vector[place : place + matrix.shape[0]])
                place += matrix.shape[0]
                total = part if total is None else total + part
        assert total is not None
        return DeviceMessage("pulled", arrays={"gradient": total})

    def _build(self, request: DeviceMessage) -> DeviceMessage:
        name, version = request.text("block"), request.whole("version", 1)
        training = request.text("training")
        listed = request.fields.get("parts")
        if not isinstance(listed, list) or not 1 <= len(listed) <= _MAX_PARTS or not name.isalnum():
            raise ProtocolError(f"block {name!r} is to be made of {listed!r}")
        parts: list[tuple[float, DataMatrix]] = []
        received = 0
        for part in listed:
            try:
                address, source, source_version, factor = part
                factor = float(factor)
            except (TypeError, ValueError) as error:
                raise ProtocolError(f"block {name} is to be made of {part!r}") from error
            if address == self.address or not address:
                parts.append((factor, self._block(source, source_version).matrix))
                continue
            if self._fetch is None:
                raise ConfigurationError(f"device {self.name} cannot reach other devices")
            wanted = DeviceMessage("fetch", {"training": training, "block": source, "version": source_version})
            found = self._fetch(address, wanted)
            if found.kind != "block":
                raise EvenkeelError(f"block {source} could not be had from {address}: {found.fields.get('text')}")
            received += size_bytes(found)
            parts.append((factor, from_arrays(found.arrays, f"block {source} from {address}")))
        if len({matrix.shape[1] for _, matrix in parts}) > 1:
            raise EvenkeelError(f"block {name} is to be made of blocks with different numbers of columns")
        matrix = combine(parts)
        rows = request.whole("rows", 1)
        if matrix.shape[0] != rows:  # the blocks it was solved for from may be longer, with nothing in these rows
            matrix = matrix.picked(np.arange(rows))
        labels = request.arrays.get("labels")
        if labels is not None:
            labels = as_labels(labels, rows)
        self._store.put(name, HeldBlock(version, matrix, labels))
        return DeviceMessage(
            "built", {"received_bytes": received, "rows": matrix.shape[0], "nonzeros": matrix.nonzeros}
        )

    def _give(self, request: DeviceMessage) -> DeviceMessage:
        name = request.text("block")
        if request.text("training") != self._store.membership.training:
            raise _LackingError(f"device {self.name} takes part in another training", [name])
        block = self._block(name, request.whole("version"))
        return DeviceMessage("block", arrays=block.matrix.arrays())


def _never() -> bool:
    return False


class _LackingError(EvenkeelError):
    """Says that a device does not hold blocks that a request names."""

    def __init__(self, text: str, blocks: list[str]) -> None:
        super().__init__(text)
        self.blocks = blocks


def signed_labels(labels: FloatArray, classes: object) -> FloatArray:
    """Gives labels as losses take them: -1 and 1 for two classes, as they are for real numbers (no classes).

    Raises:
        ProtocolError: what should be two classes is something else.
    """
    if classes is None:
        return labels
    if not isinstance(classes, list | tuple) or len(classes) != 2:
        raise ProtocolError(f"classes {classes!r}; expected two")
    return np.where(labels == classes[1], 1.0, -1.0)


def _rows(request: DeviceMessage) -> Any:
    """Gives the numbers of the rows of a mini-batch; None for all."""
    rows = request.arrays.get("rows")
    if rows is not None and (rows.ndim != 1 or rows.dtype.kind != "i" or not len(rows) or rows.min() < 0):
        raise ProtocolError("rows of a mini-batch that are no numbers of rows")
    return rows


def _spans(request: DeviceMessage, block: str, count: int) -> list[tuple[int, int]] | None:
    """Gives the rows of a block that a request is about, from where to before where; None: all of them.

    Raises:
        ProtocolError: they are none of the block's.
    """
    given = request.fields.get("spans", {})
    listed = given.get(block) if isinstance(given, dict) else ()
    if listed is None:
        return None
    try:
        spans = [(low, high) for low, high in listed]
        if not 1 <= len(spans) <= _MAX_PARTS or not all(type(cut) is int for span in spans for cut in span):
            raise ValueError
        cuts = [cut for span in spans for cut in span]
        if cuts[0] < 0 or cuts[-1] > count or not all(low < high for low, high in spans) or cuts != sorted(cuts):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"rows {listed!r} of block {block}, which has {count}") from error
    return spans


def _parts(matrix: DataMatrix, request: DeviceMessage, block: str) -> list[DataMatrix]:
    """Gives the rows of a block that a request is about: of a mini-batch or all, and of these some or all."""
    rows = _rows(request)
    spans = _spans(request, block, matrix.shape[0] if rows is None else len(rows))
    if spans is None:
        return [matrix if rows is None else matrix.picked(rows)]
    if rows is None:
        return [matrix.between(low, high) for low, high in spans]
    return [matrix.picked(rows[low:high]) for low, high in spans]


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _digest(data: DataMatrix | None, labels: FloatArray) -> str:
    """Names the examples: any change of them changes it."""
    if data is None:
        return ""
    hashed = hashlib.sha256()
    for name, array in [*sorted(data.arrays().items()), ("labels", labels)]:
        hashed.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()
