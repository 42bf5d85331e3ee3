"""Computes one exact gradient from devices, some of which are slow, leave or err. Knows no sockets and no clock.

First each device sends the products of its partition with the weights, and its gradient (the optimistic way: it holds
its labels). If all did, their sum is the gradient. If some are missing once waiting longer is not worth it, then

    products   devices that replied multiply their further blocks too; the missing partitions' products are solved for
    pull       each device multiplies its blocks' transposes with its share of what the missing gradients need

Without labels on the devices all partitions count as missing, and the same two phases give the whole gradient. A device
that is lost between the phases takes its share with it: the rest is solved for again without it. A device whose
gradient does not fit its products is a fault, and then as good as lost.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear import LinearDecoder
from evenkeel.errors import ProtocolError
from evenkeel.training.coded.checks import GradientCheck, padded, picked, suspects
from evenkeel.training.coded.layout import BlockLayout
from evenkeel.training.coded.losses import PredictorLoss
from evenkeel.training.coded.messages import DeviceMessage

__all__ = ["Evaluation", "GradientRound", "RoundSettings", "RoundTask"]

_GOOD_CONDITION = 1e3  # with a better one, no further products are waited for


@dataclass(frozen=True)
class RoundSettings:
    """Says how a round goes.

    Attributes:
        optimistic: devices hold labels and send their gradient at once.
        patience: how much longer than half of the devices took the others are waited for, as a share. Higher saves
            work when devices are late by chance, lower saves time when they are slow.
        least_wait_s: such waiting is never shorter.
        slack: how many more blocks are asked for than are missing: better conditioned, and one may be late.
        precision: smallest relative difference of the devices' numbers.
    """

    optimistic: bool = True
    patience: float = 0.5
    least_wait_s: float = 0.005
    slack: int = 1
    precision: float = 2.0**-52


@dataclass(frozen=True)
class RoundTask:
    """Says what is wanted of a round.

    Attributes:
        number: of the round; devices forget what is left of lower ones.
        training: that the blocks belong to.
        weights: at which the gradient is wanted.
        loss: of the examples.
        labels: of each partition, as the loss takes them.
        classes: the two labels, for devices; None: labels are real numbers.
        rows: of each partition that take part; None: all.
        inspect: ask for all further blocks' products, and see whether they fit the code.
    """

    number: int
    training: str
    weights: FloatArray
    loss: PredictorLoss
    labels: Mapping[str, FloatArray]
    classes: tuple[float, float] | None = None
    rows: Array | None = None
    inspect: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Holds what a round gave: sums over all examples that took part.

    Attributes:
        value: sum of the losses.
        gradient: of that sum.
        examples: how many took part.
        decoded: partitions whose gradient was solved for.
        condition: of the decoder; 1 where nothing was decoded.
        seconds: that the round took.
    """

    value: float
    gradient: FloatArray
    examples: int
    decoded: tuple[str, ...] = ()
    condition: float = 1.0
    seconds: float = 0.0


@dataclass
class _PullPlan:
    """Holds the pull phase: which gradients it stands for, and what each device is to do."""

    covered: frozenset[str]
    missing: list[str]
    shares: dict[str, dict[str, FloatArray]]  # device -> block -> vector
    products: dict[str, Array]  # of the blocks that are multiplied
    condition: float
    pulled: dict[str, Array] = field(default_factory=dict)


class GradientRound:
    """Runs one round: give it what happens, send what it gives.

    Args:
        task: what is wanted.
        layout: which device holds which block.
        settings: how.
        check: compares gradients with known products.
        present: devices that are there.
        slow: those that the last rounds did not wait for: this one does not, either.
        ticket: gives a fresh number for each request.
        now: seconds.

    Attributes:
        result: the gradient, once it is there.
        due_s: when `timeout` is to be called; None: not at all.
        faults: devices that erred, and how.
        lacking: devices, and blocks that they turned out not to have.
        late: devices that the round did not wait for.
    """

    def __init__(
        self,
        task: RoundTask,
        layout: BlockLayout,
        settings: RoundSettings,
        check: GradientCheck,
        present: Collection[str],
        slow: Collection[str],
        ticket: Callable[[], int],
        now: float,
    ) -> None:
        self._task, self._layout, self._settings, self._check = task, layout, settings, check
        self._alive = set(present)
        self.late = set(slow) & self._alive
        self._ticket, self._began_s = ticket, now
        self._open: dict[int, tuple[str, Literal["step", "pull"], tuple[str, ...]]] = {}
        self._asked: set[str] = set()
        self._products: dict[str, Array] = {}
        self._gradients: dict[str, tuple[frozenset[str], Array]] = {}
        self._slopes: dict[str, FloatArray] = {}
        self._costs: dict[str, float] = {}
        self._responsive: set[str] = set()
        self._recovering = False
        self._plan: _PullPlan | None = None
        self._chosen: tuple[object, list[str] | None] | None = None  # the last choice of blocks, and for what
        self._inspected = False
        self._timeouts = 0  # in the phases after the first
        self._half_s = 0.0  # how long half of the devices took
        self.due_s: float | None = None
        self.result: Evaluation | None = None
        self.faults: dict[str, str] = {}
        self.lacking: list[tuple[str, str]] = []

    # What happens.

    def begin(self) -> list[tuple[str, DeviceMessage]]:
        """Gives the first requests."""
        requests = []
        further = self._eager()
        for device in sorted(self._alive):
            requests += self._ask_products(device, further)
        return requests

    def reply(self, device: str, message: DeviceMessage, now: float) -> list[tuple[str, DeviceMessage]]:
        """Takes a reply; gives what is to be asked next."""
        sent = self._open.pop(message.fields.get("ticket"), None)  # type: ignore[arg-type]
        if sent is None or sent[0] != device or device not in self._alive or self.result is not None:
            return []
        _, kind, blocks = sent
        if message.kind == "error":
            lacking = [block for block in blocks if block in message.fields.get("lacking", ())]
            if not lacking:
                return self._fault(device, f"it could not do its work: {message.fields.get('text')}", now)
            self.lacking += [(device, block) for block in lacking]
            return self.lost(device, now)
        try:
            complaint = (
                self._take_products(device, blocks, message) if kind == "step" else self._take_pull(device, message)
            )
        except ProtocolError as error:
            complaint = str(error)
        if complaint:
            return self._fault(device, complaint, now)
        self._responsive.add(device)
        return self._advance(now)

    def lost(self, device: str, now: float) -> list[tuple[str, DeviceMessage]]:
        """Does without a device that is gone; what it sent before still counts."""
        self._alive.discard(device)
        self._responsive.discard(device)
        self._open = {ticket: sent for ticket, sent in self._open.items() if sent[0] != device}
        if self._plan is not None and device in self._plan.shares.keys() - self._plan.pulled.keys():
            self._drop_plan()
        self._asked -= {block for block in self._layout.held_by({device}) if block not in self._products}
        return self._advance(now)

    def joined(self, device: str, now: float) -> list[tuple[str, DeviceMessage]]:
        """Asks a device that is there again."""
        if self.result is not None or device in self.faults:
            return []
        requests = self.lost(device, now)
        self._alive.add(device)
        self.late.discard(device)
        return requests + self._ask_products(device, self._eager())

    def timeout(self, now: float) -> list[tuple[str, DeviceMessage]]:
        """Waits no longer for devices that are late."""
        self.due_s = None
        slow = {sent[0] for sent in self._open.values()}
        self.late |= slow
        if self._recovering:
            self._timeouts += 1
            self._responsive -= slow
            if self._plan is not None and slow & (self._plan.shares.keys() - self._plan.pulled.keys()):
                self._drop_plan()
        self._recovering = True
        return self._advance(now)

    def missing(self) -> list[str]:
        """Names the partitions whose gradients are not there, and that the devices that are there do not tell."""
        covered = frozenset().union(*(blocks for blocks, _ in self._gradients.values()))
        return [block for block in self._layout.untold(self._layout.held_by(self._alive)) if block not in covered]

    # Requests.

    def _eager(self) -> set[str]:
        """Names the further blocks that are asked for at once, since some partitions will be missing."""
        layout = self._layout
        if self._task.inspect:
            return set(layout.sums)
        quick = layout.held_by(self._alive - self.late)
        if len([block for block in quick if layout.place[block] < len(layout.rows)]) == len(layout.rows):
            return set()
        chosen = layout.code.choose((layout.place[block] for block in quick), self._settings.slack)
        return {layout.blocks[place] for place in chosen} & set(layout.sums)

    def _request(
        self,
        device: str,
        kind: Literal["step", "pull"],
        blocks: Collection[str],
        arrays: dict[str, Array],
        **more: object,
    ) -> tuple[str, DeviceMessage]:
        ticket = self._ticket()
        self._open[ticket] = (device, kind, tuple(blocks))
        if self._task.rows is not None:
            arrays["rows"] = self._task.rows
        fields = {
            "ticket": ticket,
            "round": self._task.number,
            "training": self._task.training,
            "blocks": {block: self._layout.versions[block] for block in blocks},
            **more,
        }
        return device, DeviceMessage(kind, fields, arrays)

    def _ask_products(self, device: str, further: Collection[str]) -> list[tuple[str, DeviceMessage]]:
        own = set(self._layout.partitions)
        blocks = [
            block
            for block in self._layout.held_by({device})
            if (block in own or block in further) and block not in self._asked and block not in self._products
        ]
        if not blocks:
            return []
        self._asked |= set(blocks)
        with_loss = self._settings.optimistic and not own.isdisjoint(blocks)
        more = {"loss": self._task.loss.name, "classes": self._task.classes} if with_loss else {}
        return [self._request(device, "step", blocks, {"w": self._task.weights}, **more)]

    # Replies.

    def _rows_of(self, block: str) -> int:
        return self._layout.rows_of(block) if self._task.rows is None else len(self._task.rows)

    def _take_products(self, device: str, blocks: tuple[str, ...], message: DeviceMessage) -> str:
        products = {block: message.array(f"z{block}", self._rows_of(block)) for block in blocks}
        own = [block for block in blocks if self._layout.place[block] < len(self._layout.rows)]
        if self._settings.optimistic and own:
            gradient = message.array("gradient", len(self._task.weights))
            slopes = {}
            for block in own:
                slopes[block], self._costs[block] = self._slope(block, products[block])
            complaint = self._check.complaint(gradient, slopes, products, self._task.weights, self._task.rows)
            if complaint:
                return complaint
            self._gradients[device] = (frozenset(own), gradient)
        self._products |= products
        return ""

    def _slope(self, block: str, product: Array) -> tuple[FloatArray, float]:
        """Gives the derivative of the loss by the products, and the loss itself; rows beyond the last count nothing."""
        task = self._task
        labels = picked(task.labels[block], task.rows)
        count = len(task.labels[block])
        predicted = product.astype(np.float64)
        slope, cost = task.loss.slope(predicted, labels), task.loss.cost(predicted, labels)
        if task.rows is not None:
            beyond = task.rows >= count
            slope[beyond] = cost[beyond] = 0.0
        return slope, float(cost.sum())

    def _take_pull(self, device: str, message: DeviceMessage) -> str:
        gradient = message.array("gradient", len(self._task.weights))
        plan = self._plan
        if plan is None:
            return ""
        complaint = self._check.complaint(
            gradient, plan.shares[device], plan.products, self._task.weights, self._task.rows
        )
        if not complaint:
            plan.pulled[device] = gradient
        return complaint

    def _fault(self, device: str, complaint: str, now: float) -> list[tuple[str, DeviceMessage]]:
        """Does without a device that erred, and without what it sent."""
        self.faults[device] = complaint
        for block in self._layout.held_by({device}):
            self._products.pop(block, None)
        self._gradients.pop(device, None)
        self._drop_plan()
        return self.lost(device, now)

    # What comes next.

    def _drop_plan(self) -> None:
        """Gives the pull phase up, to make another plan of it; replies to the old one count nothing."""
        self._plan = None
        self._open = {ticket: sent for ticket, sent in self._open.items() if sent[1] != "pull"}

    def _advance(self, now: float) -> list[tuple[str, DeviceMessage]]:
        if self.result is not None:
            return []
        if self._task.inspect and not self._inspected and (self._recovering or not self._open):
            self._inspected = True
            fault = self._inspect()
            if fault:
                return self._fault(fault, "its products do not fit the code", now)
        covered = frozenset().union(*(blocks for blocks, _ in self._gradients.values()))
        missing = [block for block in self._layout.partitions if block not in covered]
        if not missing and (self._inspected or not self._task.inspect):
            self._finish(covered, None, now)
            return []
        if not self._recovering:
            if not self._worth_recovering(now):
                return []
            self._recovering = True
        return self._recover(covered, missing, now)

    def _inspect(self) -> str:
        """Gives the device whose products do not fit the code; empty where all fit.

        Raises:
            ProtocolError: they do not fit, and the device at fault is not known.
        """
        found = suspects(self._layout, self._products, self._settings.precision)
        if found is None:
            return ""
        if len(found) != 1:
            whose = f"one of {', '.join(found)}" if found else "more than one device"
            raise ProtocolError(
                f"round {self._task.number}: products do not fit the code, and what is wrong may be {whose}; "
                "look at these devices' memory and data, or exclude one of them"
            )
        return found[0]

    def _worth_recovering(self, now: float) -> bool:
        """Tells whether to go on without the missing ones; once half have replied, says when it will be."""
        waiting = {sent[0] for sent in self._open.values()}
        if waiting <= self.late:
            return True
        if self.due_s is None and 2 * len(self._responsive) >= len(self._alive - self.late):
            self._half_s = now - self._began_s
            self.due_s = now + max(self._settings.least_wait_s, self._settings.patience * (now - self._began_s))
        return False

    def _recover(self, covered: frozenset[str], missing: list[str], now: float) -> list[tuple[str, DeviceMessage]]:
        layout = self._layout
        if self._plan is None:
            target = self._target(missing)
            if target is None:
                return []  # who is missing must come back, or reply after all
            requests = []
            for device in sorted({layout.holders[block] for block in target}):
                requests += self._ask_products(device, target)
            known = [block for block in target if block in self._products]
            pending = [block for block in target if block not in self._products]
            if set(layout.untold(known)) & set(missing) or (pending and self._condition(known) > _GOOD_CONDITION):
                self._wait(now)
                return requests
            plan = self._make_plan(covered, missing, known)
            self._plan = plan
            for device, shares in plan.shares.items():
                requests.append(self._request(device, "pull", shares, {f"v{block}": v for block, v in shares.items()}))
            self._wait(now)
            if plan.shares:
                return requests
        plan = self._plan
        if plan.shares.keys() <= plan.pulled.keys():
            self._finish(plan.covered, plan, now)
        return []

    def _target(self, missing: list[str]) -> list[str] | None:
        """Chooses blocks from which what is missing follows: of devices that replied, else of all that are there."""
        layout = self._layout
        situation = (frozenset(self._responsive), frozenset(self._alive), tuple(missing))
        if self._chosen is None or self._chosen[0] != situation:
            self._chosen = (situation, None)
            for devices in (self._responsive, self._alive):
                held = layout.held_by(devices)
                few = layout.code.choose((layout.place[block] for block in held), self._settings.slack)
                for blocks in ([layout.blocks[place] for place in few], held):
                    if self._chosen[1] is None and not set(layout.untold(blocks)) & set(missing):
                        self._chosen = (situation, blocks)
        return self._chosen[1]

    def _condition(self, blocks: list[str]) -> float:
        return self._layout.code.decoder((self._layout.place[block] for block in blocks), partial=True).condition

    def _wait(self, now: float) -> None:
        settings = self._settings
        usual_s = (1 + settings.patience) * (self._half_s or now - self._began_s)
        # Twice as long after each time that it was not enough, or work would be given anew faster than it can be done.
        self.due_s = now + max(settings.least_wait_s, usual_s) * 2.0**self._timeouts

    def _make_plan(self, covered: frozenset[str], missing: list[str], known: list[str]) -> _PullPlan:
        layout = self._layout
        length = len(self._task.rows) if self._task.rows is not None else max(layout.rows)
        there = dict.fromkeys([*known, *(block for block in layout.partitions if block in self._products)])
        products = {block: padded(self._products[block], length) for block in there}
        telling = layout.code.decoder((layout.place[block] for block in there), partial=True)
        slopes = {}
        for block in missing:
            if block in products:
                product = products[block]
            else:
                row = telling.weights[layout.place[block]]
                product = np.zeros(length)
                for place in np.flatnonzero(row):
                    product += row[place] * products[layout.blocks[telling.blocks[place]]]
            slopes[block], self._costs[block] = self._slope(block, product[: self._rows_of(block)])
        sharing = self._sharing(missing, known)
        shares: dict[str, dict[str, FloatArray]] = {}
        for column, number in enumerate(sharing.blocks):
            name = layout.blocks[number]
            vector = np.zeros(self._rows_of(name))
            used = False
            for block in missing:
                weight = sharing.weights[layout.place[block], column]
                if weight:
                    slope = slopes[block]
                    # Cut where the block ends: all its further rows are zero.
                    vector[: len(slope)] += weight * slope[: len(vector)]
                    used = True
            if used:
                shares.setdefault(layout.holders[name], {})[name] = vector
        sent = {block: self._products[block] for block in known}
        return _PullPlan(covered, missing, shares, sent, sharing.condition)

    def _sharing(self, missing: list[str], known: list[str]) -> LinearDecoder:
        """Gives the decoder that shares the work: of as few sums as condition well, so that few devices are needed."""
        code, places = self._layout.code, [self._layout.place[block] for block in known]
        few = code.decoder(code.choose(places, slack=0), partial=True)
        if few.condition <= _GOOD_CONDITION and not {self._layout.place[block] for block in missing} & set(few.missing):
            return few
        return code.decoder(places, partial=True)

    def _finish(self, covered: frozenset[str], plan: _PullPlan | None, now: float) -> None:
        gradient = np.zeros(len(self._task.weights))
        for device in sorted(self._gradients, key=self._first_place):
            blocks, part = self._gradients[device]
            if blocks <= covered:
                gradient += part
        if plan is not None:
            for device in sorted(plan.pulled):
                gradient += plan.pulled[device]
        task = self._task
        if task.rows is None:
            examples = sum(map(len, task.labels.values()))
        else:
            examples = sum(int((task.rows < len(labels)).sum()) for labels in task.labels.values())
        self.late -= self._responsive - {sent[0] for sent in self._open.values()}
        self.due_s = None
        self.result = Evaluation(
            sum(self._costs[block] for block in self._layout.partitions),
            gradient,
            examples,
            () if plan is None or not self._settings.optimistic else tuple(plan.missing),
            1.0 if plan is None else plan.condition,
            now - self._began_s,
        )

    def _first_place(self, device: str) -> int:
        return min(self._layout.place[block] for block in self._gradients[device][0])
