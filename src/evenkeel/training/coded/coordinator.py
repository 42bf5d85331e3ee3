"""Coordinates devices: sets the code up, runs rounds, takes in, mends and excludes devices, and remembers all that.

What it knows is written to a folder whenever it changes, so that a coordinator that was killed goes on where it was.
Data and blocks stay on the devices; of them the coordinator has labels and products alone. That is no privacy:
products with enough different weights give the data away (docs/systems/coded_training.md).
"""

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear import LinearCode, PartitionCode
from evenkeel.errors import ConfigurationError, EvenkeelError, ProtocolError, UndecodableError
from evenkeel.files import read_arrays
from evenkeel.training.coded.checks import GradientCheck, suspects
from evenkeel.training.coded.device import OWN_VERSION, signed_labels
from evenkeel.training.coded.gradient_round import Evaluation, GradientRound, RoundSettings, RoundTask
from evenkeel.training.coded.layout import BlockLayout
from evenkeel.training.coded.links import DeviceEvent, DeviceLink
from evenkeel.training.coded.losses import PredictorLoss
from evenkeel.training.coded.messages import DeviceMessage

__all__ = ["CodedSettings", "Coordinator", "replace_file"]

_log = logging.getLogger(__name__)
CodeMaker = Callable[[int, Sequence[int]], LinearCode]


@dataclass(frozen=True)
class CodedSettings:
    """Says how a coordinator treats its devices.

    Attributes:
        dtype: of the devices' numbers: float32 halves memory and bytes, float64 is exact to rounding.
        intercept: data gets a last column of ones.
        optimistic, patience, least_wait_s, slack: as `RoundSettings` has them.
        inspect_every: in every so manieth round all further blocks' products are compared; 0: never.
        wait_s: how long a round waits for devices without which it cannot be done.
        gone_after_rounds: a device that was away for so many rounds is gone for good: its blocks are made again
            elsewhere. 0: never.
        copies: in how many further blocks a partition goes that joins late.
        seed: of the probe and of a late partition's factors.
    """

    dtype: str = "float64"
    intercept: bool = False
    optimistic: bool = True
    patience: float = 0.3
    least_wait_s: float = 0.005
    slack: int = 1
    inspect_every: int = 32
    wait_s: float = 60.0
    gone_after_rounds: int = 0
    copies: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise ConfigurationError(f"dtype must be float32 or float64, found {self.dtype!r}")
        if not self.least_wait_s > 0:
            raise ConfigurationError(f"least_wait_s must be above 0, found {self.least_wait_s}")
        for name, least in (
            ("patience", 0),
            ("slack", 0),
            ("inspect_every", 0),
            ("wait_s", 0),
            ("gone_after_rounds", 0),
            ("copies", 0),
            ("seed", 0),
        ):
            if not getattr(self, name) >= least:
                raise ConfigurationError(f"{name} must be at least {least}, found {getattr(self, name)}")

    @property
    def precision(self) -> float:
        """Gives the smallest relative difference of the devices' numbers."""
        return float(np.finfo(self.dtype).eps)


@dataclass
class _Known:
    """Holds what is known of a device."""

    digest: str
    rows: int
    columns: int
    address: str
    own: str = ""
    excluded: str = ""
    away_rounds: int = 0
    here: bool = False
    held: dict[str, int] = field(default_factory=dict)


class Coordinator:
    """Gives exact gradients over the data of devices.

    Args:
        link: reaches the devices.
        code: makes the code for a number of partitions, whose nonzeros it is given.
        settings: how devices are treated.
        folder: where its memory is kept; None: in this process alone. What lies there is gone on with.

    Attributes:
        setup_bytes: that devices sent each other before training.
        repair_bytes: that devices sent each other later: for those gone, and for those that joined.
        rounds: how many there were.

    Raises:
        ConfigurationError: the folder holds something else.
    """

    def __init__(
        self, link: DeviceLink, code: CodeMaker, settings: CodedSettings | None = None, folder: Path | None = None
    ) -> None:
        self.settings = settings or CodedSettings()
        self._link, self._make_code, self.folder = link, code, folder
        self._known: dict[str, _Known] = {}
        self._layout: BlockLayout | None = None
        self._assigned: dict[str, str] = {}  # of each block, who is to hold it; the layout has who does
        self._labels: dict[str, FloatArray] = {}
        self._signed: tuple[object, dict[str, FloatArray]] = (None, {})  # labels as the loss takes them, and for what
        self._probed: dict[str, FloatArray] = {}
        self._drawn: tuple[object, FloatArray] = (None, np.empty(0))  # the probe, and for what
        self._training = ""
        self._columns = 0
        self._tickets = 0
        self._round: GradientRound | None = None
        self._waiting: dict[int, DeviceMessage | None] = {}
        self._requests: dict[int, str] = {}
        self._late: set[str] = set()  # in the last round
        self._slow: set[str] = set()  # late twice running: by more than chance
        self.setup_bytes = self.repair_bytes = self.rounds = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(f"folder {folder} cannot be made: {error.strerror or error}") from error
            self._load(folder / "coordinator.npz")

    # What is known.

    @property
    def columns(self) -> int:
        """Counts the weights: the data's columns, and one for the intercept."""
        return self._columns + self.settings.intercept

    @property
    def examples(self) -> int:
        """Counts the examples of all partitions."""
        return sum(map(len, self._labels.values()))

    @property
    def labels(self) -> Mapping[str, FloatArray]:
        """Gives each partition's labels, as the devices have them."""
        return self._labels

    @property
    def layout(self) -> BlockLayout:
        """Gives which device holds which block.

        Raises:
            ConfigurationError: nothing is set up yet.
        """
        if self._layout is None:
            raise ConfigurationError("the coordinator is not set up yet; call set_up first")
        return self._layout

    @property
    def present(self) -> list[str]:
        """Names the devices that are there."""
        return sorted(name for name, known in self._known.items() if known.here and not known.excluded)

    @property
    def excluded(self) -> dict[str, str]:
        """Gives the devices that were excluded, and why."""
        return {name: known.excluded for name, known in self._known.items() if known.excluded}

    @property
    def bytes(self) -> tuple[int, int]:
        """Gives the bytes sent to devices and received from them."""
        return self._link.sent_bytes, self._link.received_bytes

    def time(self) -> float:
        """Gives the link's seconds."""
        return self._link.time()

    def dismiss(self) -> None:
        """Has the processes of all devices that are there end."""
        self._send([(name, DeviceMessage("end")) for name in self.present])

    # Setting up.

    def set_up(self, devices: int, timeout_s: float = 60.0) -> None:
        """Waits for devices, distributes the code's blocks among them and checks these.

        Args:
            devices: that take part from the beginning. On going on, those that are needed suffice.
            timeout_s: for all of it, without progress.

        Raises:
            ConfigurationError: the devices' data does not fit together; says whose.
            EvenkeelError: too few came, or blocks could not be made; says which.
        """
        if self._layout is not None:
            self._wait_until(lambda: not self.layout.untold(self._available()), timeout_s, self._who_is_needed)
            return
        self._wait_until(
            lambda: len(self.present) >= devices,
            timeout_s,
            lambda: f"{len(self.present)} of {devices} devices came: {', '.join(self.present) or 'none'}",
        )
        names = self.present
        owners = [name for name in names if self._known[name].rows]
        helpers = [name for name in names if not self._known[name].rows]
        if not owners:
            raise ConfigurationError("none of the devices has examples; give at least one of them --data")
        widths = {self._known[name].columns for name in owners}
        if len(widths) > 1:
            seen = ", ".join(f"{name}: {self._known[name].columns}" for name in owners)
            raise ConfigurationError(
                f"the devices' data has different numbers of columns ({seen}); say --columns on each"
            )
        self._columns = widths.pop()
        self._training = secrets.token_hex(8)
        code = self._code(owners, helpers)
        holders = {f"d{place}": name for place, name in enumerate(owners)}
        people = [*owners, *helpers]
        self._assigned = holders | {
            f"p{place}": people[holder] for place, holder in enumerate(code.holders[len(owners) :])
        }
        self._layout = BlockLayout(
            code.parity.copy(),
            dict.fromkeys(self._assigned, ""),
            dict.fromkeys(self._assigned, OWN_VERSION),
            [self._known[name].rows for name in owners],
        )
        try:
            for place, name in enumerate(owners):
                self._known[name].own = f"d{place}"
            self._adopt(names)
            self._ask_labels([f"d{place}" for place in range(len(owners))])
            self._probe_partitions(self.layout.partitions)
            missing = self._build(self.layout.sums, timeout_s)
            self.setup_bytes, self.repair_bytes = self.repair_bytes, 0
            if missing:
                raise EvenkeelError(f"blocks could not be made: {'; '.join(missing)}")
        except BaseException:
            self._layout = None  # nothing half done is gone on with
            raise
        self._save()

    def _code(self, owners: list[str], helpers: list[str]) -> PartitionCode:
        code = self._make_code(len(owners), [self._known[name].rows for name in owners])
        if not isinstance(code, PartitionCode):
            raise ConfigurationError(f"code {code.name} does not tell single partitions, which coded training needs")
        if code.devices > len(owners) + len(helpers):
            raise ConfigurationError(
                f"code {code.name} needs {code.devices - len(owners)} devices without data of their own besides "
                f"{len(owners)} with data; {len(helpers)} are there"
            )
        return code

    def _adopt(self, names: Sequence[str]) -> None:
        """Has devices take part in this training; own examples are a block from then on."""
        settings = self.settings
        requests = []
        for name in names:
            known = self._known[name]
            own = known.own if known.own and self._assigned.get(known.own) == name else ""
            fields = {"training": self._training, "own": own, "dtype": settings.dtype, "ones": settings.intercept}
            requests.append((name, DeviceMessage("adopt", fields)))
        for name, reply in zip(names, self._ask(requests), strict=True):
            if reply is None:
                continue
            if reply.kind == "error":
                raise EvenkeelError(f"device {name} cannot take part: {reply.fields.get('text')}")
            known = self._known[name]
            known.held = {known.own: OWN_VERSION} if known.own else {}
            self._note_held(name)

    def _ask_labels(self, blocks: Sequence[str]) -> None:
        holders = [self._assigned[block] for block in blocks]
        replies = self._ask([(name, DeviceMessage("labels")) for name in holders])
        for block, name, reply in zip(blocks, holders, replies, strict=True):
            if reply is None:
                raise EvenkeelError(f"device {name} left before it gave the labels of its partition")
            labels = reply.array("labels", self._known[name].rows).astype(np.float64)
            self._labels[block] = labels

    def _probe_partitions(self, blocks: Sequence[str]) -> None:
        """Multiplies partitions with the probe, by which their devices' gradients are checked from then on."""
        holders = [self._assigned[block] for block in blocks]
        requests = [
            self._product_request(name, [block], self._probe()) for block, name in zip(blocks, holders, strict=True)
        ]
        for block, name, reply in zip(blocks, holders, self._ask(requests), strict=True):
            if reply is None or reply.kind != "products":
                raise EvenkeelError(f"device {name} did not give the products of its partition")
            self._probed[block] = reply.array(f"z{block}", len(self._labels[block])).astype(np.float64)

    def _probe(self) -> FloatArray:
        needed = (self._training, self.columns)
        if self._drawn[0] != needed:
            random = np.random.default_rng([self.settings.seed, int(self._training, 16)])
            self._drawn = (needed, random.choice([-1.0, 1.0], self.columns))
        return self._drawn[1]

    def _product_request(self, name: str, blocks: Sequence[str], weights: FloatArray) -> tuple[str, DeviceMessage]:
        versions = {block: self.layout.versions[block] for block in blocks}
        fields = {"training": self._training, "blocks": versions, "round": self.rounds}
        return name, DeviceMessage("step", fields, {"w": weights})

    def _build(self, blocks: Sequence[str], timeout_s: float | None = None) -> list[str]:
        """Has blocks made where they are to be, from what is there, and checks them; says which could not be, and
        why.
        """
        layout, problems = self.layout, []
        available = self._available()
        requests: list[tuple[str, DeviceMessage]] = []
        for block in blocks:
            try:
                recipe = layout.recipe(block, available)
            except UndecodableError as error:
                problems.append(str(error))
                continue
            requests.append(self._build_request(block, recipe))
        made = [str(message.fields["block"]) for _, message in requests]
        replies = self._ask(requests, timeout_s)
        good = []
        for block, (name, _), reply in zip(made, requests, replies, strict=True):
            if reply is None or reply.kind != "built":
                why = "it left" if reply is None else reply.fields.get("text")
                problems.append(f"block {block} on device {name}: {why}")
            else:
                self.repair_bytes += reply.whole("received_bytes")
                good.append(block)
        problems += self._check_built(good)
        return problems

    def _build_request(self, block: str, recipe: Sequence[tuple[str, float]]) -> tuple[str, DeviceMessage]:
        layout, name = self.layout, self._assigned[block]
        parts = []
        for source, factor in recipe:
            holder = layout.holders[source]
            parts.append(
                ["" if holder == name else self._known[holder].address, source, layout.versions[source], factor]
            )
        fields = {
            "training": self._training,
            "block": block,
            "version": layout.versions[block],
            "rows": layout.rows_of(block),
            "parts": parts,
        }
        arrays: dict[str, Array] = {"labels": self._labels[block]} if block in self._labels else {}
        return name, DeviceMessage("build", fields, arrays)

    def _check_built(self, blocks: Sequence[str]) -> list[str]:
        """Compares the probe's products of new blocks with what the code says they are."""
        layout, problems = self.layout, []
        requests = [self._product_request(self._assigned[block], [block], self._probe()) for block in blocks]
        found: dict[str, FloatArray] = {}
        for block, (name, _), reply in zip(blocks, requests, self._ask(requests), strict=True):
            if reply is None or reply.kind != "products":
                problems.append(f"block {block}: device {name} left or failed before it was checked")
                continue
            found[block] = reply.array(f"z{block}", layout.rows_of(block)).astype(np.float64)
        before = dict(layout.holders)
        layout.holders |= {block: self._assigned[block] for block in found}
        for block in found:
            name = self._assigned[block]
            self._known[name].held[block] = layout.versions[block]
        sums = {block: product for block, product in found.items() if block not in self._probed or block in layout.sums}
        products = {block: self._probed[block] for block in layout.partitions} | sums
        wrong = suspects(layout, products, self.settings.precision)
        rebuilt = [block for block in found if block in layout.partitions]
        for block in rebuilt:
            size = float(np.linalg.norm(self._probed[block])) + 1e-300
            if np.linalg.norm(found[block] - self._probed[block]) > 1e5 * self.settings.precision * size:
                wrong = [*(wrong or []), self._assigned[block]]
        if wrong is not None:
            if len(set(wrong)) != 1:
                layout.holders.update(before)
                raise ProtocolError(
                    "blocks that were made do not fit the code, and the device at fault is not known"
                    + (f": one of {', '.join(wrong)}" if wrong else "")
                )
            self._exclude(wrong[0], "what it made or sent of its blocks does not fit the code")
        for block in sums:
            self._probed[block] = self._coded_probe(block)
        return problems

    def _coded_probe(self, block: str) -> FloatArray:
        """Computes the probe's product of a further block from those of the partitions."""
        layout = self.layout
        row = layout.parity[layout.place[block] - len(layout.rows)]
        total: FloatArray = np.zeros(layout.rows_of(block))
        for place in np.flatnonzero(row):
            part = self._probed[layout.blocks[place]]
            total[: len(part)] += row[place] * part
        return total

    # Rounds.

    def evaluate(
        self,
        weights: FloatArray,
        loss: PredictorLoss,
        classes: tuple[float, float] | None = None,
        rows: Array | None = None,
    ) -> Evaluation:
        """Gives loss and gradient at `weights`, summed over all examples, or over the rows of a mini-batch.

        Raises:
            UndecodableError: for `wait_s` too few devices were there; names what is missing, and who has it.
            ProtocolError: what devices sent does not fit the code, and the device at fault is not known.
        """
        self.maintain()
        self.rounds += 1
        settings = self.settings
        sent = weights.astype(np.float32).astype(np.float64) if settings.dtype == "float32" else weights
        if self._signed[0] != (classes, len(self._labels)):
            labels = {block: signed_labels(each, classes) for block, each in self._labels.items()}
            self._signed = ((classes, len(labels)), labels)
        labels = self._signed[1]
        inspect = settings.inspect_every > 0 and self.rounds % settings.inspect_every == 0
        task = RoundTask(self.rounds, self._training, sent, loss, labels, classes, rows, inspect)
        how = RoundSettings(
            settings.optimistic, settings.patience, settings.least_wait_s, settings.slack, settings.precision
        )
        check = GradientCheck(self._probe(), self._probed, settings.precision)
        self._round = GradientRound(
            task, self.layout, how, check, self.present, self._slow, self._ticket, self._link.time()
        )
        try:
            return self._run_round(self._round)
        finally:
            self._slow = self._late & self._round.late
            self._late = self._round.late
            self._round = None

    def _run_round(self, running: GradientRound) -> Evaluation:
        self._send(running.begin())
        give_up_s = self._link.time() + self.settings.wait_s
        while running.result is None:
            now = self._link.time()
            if now >= give_up_s:
                raise self._too_few(running)
            until_s = give_up_s if running.due_s is None else min(running.due_s, give_up_s)
            if self._pump(until_s):  # what has come counts, however late it is looked at
                give_up_s = self._link.time() + self.settings.wait_s
            elif running.due_s is not None and self._link.time() >= running.due_s:
                self._send(running.timeout(self._link.time()))
        for name, why in running.faults.items():
            self._exclude(name, why)
        for name, block in running.lacking:
            self._known[name].held.pop(block, None)
            self._note_held(name)
        return running.result

    def _too_few(self, running: GradientRound) -> UndecodableError:
        missing = running.missing()
        places = tuple(self.layout.place[block] for block in missing)
        waited = f"round {self.rounds}: after {self.settings.wait_s:g} s without a reply "
        if not missing:
            return UndecodableError(f"{waited}devices that are there do not do their work; look at them", places)
        return UndecodableError(
            f"{waited}partitions {', '.join(missing)} cannot be computed. {self._who_is_needed()}", places
        )

    def _who_is_needed(self) -> str:
        away = sorted(name for name, known in self._known.items() if not known.here and not known.excluded)
        said = f"Away are {', '.join(away)}: bring some of them back" if away else "No device is away"
        if self.excluded:
            said += f"; excluded are {', '.join(f'{name} ({why})' for name, why in self.excluded.items())}"
        return said

    # Who comes and goes.

    def maintain(self) -> None:
        """Takes in devices that came, and has blocks made again that devices lack or that are gone for good."""
        self._drain()
        layout = self.layout
        for known in self._known.values():
            known.away_rounds = 0 if known.here else known.away_rounds + 1
        for name in self.present:
            known = self._known[name]
            if known.rows and not known.own:
                self._take_in(name)
        limit = self.settings.gone_after_rounds
        gone = {name for name, known in self._known.items() if known.excluded or (limit and known.away_rounds >= limit)}
        self._reassign(gone)
        wanted = [
            block for block in layout.blocks if not layout.holders[block] and self._assigned[block] in self.present
        ]
        if wanted:
            for problem in self._build(wanted):
                _log.warning("%s", problem)
            self._save()

    def _reassign(self, gone: set[str]) -> None:
        """Gives the blocks of devices that are gone for good to others: those with fewest blocks first."""
        layout = self.layout
        orphans = [block for block in layout.blocks if self._assigned[block] in gone]
        if not orphans or not self.present:
            return
        if layout.untold(self._available()):
            return  # they cannot be made from what is there; whoever comes back may help
        loads = dict.fromkeys(self.present, 0)
        for holder in self._assigned.values():
            if holder in loads:
                loads[holder] += 1
        for block in orphans:
            name = min(loads, key=lambda each: (loads[each], each))
            loads[name] += 1
            _log.warning("block %s of device %s is made again on device %s", block, self._assigned[block], name)
            self._assigned[block], layout.holders[block] = name, ""
        self._save()

    def _take_in(self, name: str) -> None:
        """Makes the data of a device that came later a new partition."""
        known, layout = self._known[name], self.layout
        if known.columns != self._columns:
            self._refuse(name, f"its data has {known.columns} columns, the others' {self._columns}")
            return
        block = f"d{len(layout.rows)}"
        known.own = block
        self._assigned[block] = name
        self._adopt([name])
        try:
            self._ask_labels([block])
            others = set(np.concatenate(list(self._labels.values())[:-1]))
            strange = sorted(set(self._labels[block]) - others)
            if strange and len(others) == 2:
                said = ", ".join(f"{label:g}" for label in strange[:5])
                raise ConfigurationError(f"its labels {said} are none of the others'")
            old = dict(layout.versions)
            random = np.random.default_rng([self.settings.seed, len(layout.rows)])
            changed = layout.add_partition(name, known.rows, self.settings.copies, random)
        except EvenkeelError as error:
            known.own = ""
            self._assigned.pop(block), self._labels.pop(block, None)
            self._refuse(name, str(error))
            return
        holders = {each: layout.holders[each] for each, _ in changed}
        for each, _ in changed:
            layout.holders[each] = ""
        self._probe_partitions([block])
        self._save()  # from here on blocks of the old version are worth nothing
        requests = []
        for each, factor in changed:
            if holders[each] in self.present:
                there, message = self._build_request(each, [(block, factor)])
                parts = [["", each, old[each], 1.0], *message.fields["parts"]]
                requests.append((there, DeviceMessage("build", {**message.fields, "parts": parts})))
        good = []
        for (_, message), reply in zip(requests, self._ask(requests), strict=True):
            if reply is not None and reply.kind == "built":
                self.repair_bytes += reply.whole("received_bytes")
                good.append(str(message.fields["block"]))
        for problem in self._check_built(good):
            _log.warning("%s", problem)
        self._save()

    def _exclude(self, name: str, why: str) -> None:
        known = self._known[name]
        known.excluded, known.here = why, False
        _log.warning("device %s is excluded: %s", name, why)
        self._link.send(name, DeviceMessage("refused", {"text": f"device {name} is excluded: {why}"}))
        self._link.drop(name, why)
        for block, holder in self.layout.holders.items():
            if holder == name:
                self.layout.holders[block] = ""
        self._save()

    def _refuse(self, name: str, why: str) -> None:
        _log.warning("device %s is refused: %s", name, why)
        self._link.send(name, DeviceMessage("refused", {"text": f"device {name} is refused: {why}"}))
        self._link.drop(name, why)
        self._known.pop(name, None)

    def _joined(self, name: str, hello: DeviceMessage) -> None:
        """Takes note of a device that is there, unless it is not what it was."""
        known = self._known.get(name)
        try:
            rows, columns = hello.whole("rows"), hello.whole("columns")
            digest, address, training = hello.text("digest"), hello.text("address"), hello.text("training")
            blocks = hello.fields.get("blocks")
            if not isinstance(blocks, dict) or not all(type(each) is int for each in blocks.values()):
                raise ProtocolError("its hello does not say which blocks it holds")
        except ProtocolError as error:
            self._link.drop(name, str(error))
            return
        if known is not None and known.excluded:
            self._link.send(name, DeviceMessage("refused", {"text": f"device {name} is excluded: {known.excluded}"}))
            self._link.drop(name, known.excluded)
            return
        if known is not None and known.digest != digest:
            why = "it has other data than before: give it another name, or its old data"
            self._link.send(name, DeviceMessage("refused", {"text": f"device {name} is refused: {why}"}))
            self._link.drop(name, why)
            return
        if known is None:
            known = self._known[name] = _Known(digest, rows, columns, address)
        known.address, known.here = address, True
        if self._layout is None:
            return
        if training == self._training:
            known.held = {str(block): version for block, version in blocks.items()}
        else:
            known.held = {}
            if (known.own and self._assigned.get(known.own) == name) or not known.rows:
                self._readopt(name)
        self._note_held(name)
        if self._round is not None:
            self._send(self._round.joined(name, self._link.time()))

    def _readopt(self, name: str) -> None:
        """Has a device that forgot this training take part again; requests that follow find its own block there."""
        known = self._known[name]
        fields = {
            "ticket": self._ticket(),
            "training": self._training,
            "own": known.own,
            "dtype": self.settings.dtype,
            "ones": self.settings.intercept,
        }
        self._link.send(name, DeviceMessage("adopt", fields))
        if known.own:
            known.held[known.own] = OWN_VERSION

    def _note_held(self, name: str) -> None:
        """Has the layout say which of the blocks that are to be on a device it really holds."""
        layout, held = self.layout, self._known[name].held
        for block, holder in self._assigned.items():
            if holder == name and block in layout.versions:
                layout.holders[block] = name if held.get(block) == layout.versions[block] else ""

    def _available(self) -> list[str]:
        return self.layout.held_by(set(self.present))

    # Sending and waiting.

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def _send(self, requests: Sequence[tuple[str, DeviceMessage]]) -> None:
        for name, message in requests:
            self._link.send(name, message)

    def _ask(
        self, requests: Sequence[tuple[str, DeviceMessage]], timeout_s: float | None = None
    ) -> list[DeviceMessage | None]:
        """Sends requests and waits for all replies; None for those whose device left."""
        tickets = []
        for name, message in requests:
            ticket = self._ticket()
            tickets.append(ticket)
            self._waiting[ticket] = None
            if name in self.present:
                self._requests[ticket] = name
                self._link.send(name, DeviceMessage(message.kind, {**message.fields, "ticket": ticket}, message.arrays))
        mine = set(tickets)
        self._wait_until(
            lambda: not mine & self._requests.keys(),
            self.settings.wait_s if timeout_s is None else timeout_s,
            lambda: f"no reply from {', '.join(sorted({self._requests[t] for t in mine & self._requests.keys()}))}",
        )
        return [self._waiting.pop(ticket) for ticket in tickets]

    def _wait_until(self, done: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
        """Heeds events until something is so.

        Raises:
            EvenkeelError: nothing happened for `timeout_s`.
        """
        give_up_s = self._link.time() + timeout_s
        while not done():
            if self._pump(give_up_s):
                give_up_s = self._link.time() + timeout_s
            elif self._link.time() >= give_up_s:
                raise EvenkeelError(f"waited {timeout_s:g} s without an event. {what()}")

    def _drain(self) -> None:
        while self._pump(self._link.time()):
            pass

    def _pump(self, until_s: float) -> bool:
        """Heeds what happens next; False where nothing did."""
        events = self._link.poll(until_s)
        for event in events:
            self._heed(event)
        return bool(events)

    def _heed(self, event: DeviceEvent) -> None:
        name = event.device
        if event.kind == "joined":
            self._joined(name, event.message)
            return
        known = self._known.get(name)
        if known is None or not known.here:
            return
        if event.kind == "lost":
            known.here = False
            for ticket in [ticket for ticket, device in self._requests.items() if device == name]:
                del self._requests[ticket]
            if self._round is not None:
                self._send(self._round.lost(name, self._link.time()))
            return
        answered = event.message.fields.get("ticket")
        if isinstance(answered, int) and self._requests.get(answered) == name:
            del self._requests[answered]
            self._waiting[answered] = event.message
        elif self._round is not None:
            self._send(self._round.reply(name, event.message, self._link.time()))

    # Memory.

    def _save(self) -> None:
        if self.folder is None or self._layout is None:
            return
        layout = self._layout
        said = {
            "training": self._training,
            "columns": self._columns,
            "settings": {name: getattr(self.settings, name) for name in ("dtype", "intercept", "seed")},
            "assigned": self._assigned,
            "versions": layout.versions,
            "rows": layout.rows,
            "setup_bytes": self.setup_bytes,
            "repair_bytes": self.repair_bytes,
            "devices": {name: asdict(known) for name, known in self._known.items()},
        }
        arrays: dict[str, Array] = {"said": np.frombuffer(json.dumps(said).encode(), np.uint8), "parity": layout.parity}
        arrays |= {f"labels_{block}": labels for block, labels in self._labels.items()}
        arrays |= {f"probed_{block}": products for block, products in self._probed.items()}
        buffer = BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        replace_file(self.folder / "coordinator.npz", buffer.getvalue())

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            arrays = read_arrays(path)
            said: dict[str, Any] = json.loads(arrays["said"].tobytes())
            for name, value in said["settings"].items():
                if getattr(self.settings, name) != value:
                    raise ConfigurationError(
                        f"{path} is of a training with {name} {value}, not {getattr(self.settings, name)}; "
                        "say the same, or use another folder"
                    )
            self._training, self._columns = said["training"], said["columns"]
            self._assigned = said["assigned"]
            self.setup_bytes, self.repair_bytes = said["setup_bytes"], said["repair_bytes"]
            for name, each in said["devices"].items():
                self._known[name] = _Known(**{**each, "here": False, "held": {}})
            nobody = dict.fromkeys(self._assigned, "")
            self._layout = BlockLayout(arrays["parity"], nobody, said["versions"], said["rows"])
            for name, array in arrays.items():
                kind, _, block = name.partition("_")
                if kind in ("labels", "probed"):
                    (self._labels if kind == "labels" else self._probed)[block] = array
        except ConfigurationError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} cannot be understood ({error}); use another folder") from error


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        EvenkeelError: it cannot be written.
    """
    new = path.with_suffix(".new")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError as error:
        raise EvenkeelError(f"{path} cannot be written: {error.strerror or error}") from error
