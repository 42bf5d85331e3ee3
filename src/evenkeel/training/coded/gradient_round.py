"""Computes one exact gradient from devices, some of which are slow, leave or err. Knows no sockets and no clock.

First each device sends the products of its partition with the weights, and its gradient (the optimistic way: it holds
its labels). If all did, their sum is the gradient. If some are missing, or so late that waiting is not worth it, then

    products   devices multiply their further blocks too; the missing partitions' products are solved for
    pull       each device multiplies its blocks' transposes with its share of what the missing gradients need

Without labels on the devices all partitions count as missing, and the same two phases give the whole gradient.

Three things keep the two phases short. A missing partition is in several sums: its rows are shared out among them, so
that each device multiplies a part of its sum alone. Whom the last two rounds did not wait for is not waited for in this
one: the sums are asked for at once, and devices whose gradients must be corrected for them send these later, corrected.
And what has been asked for stays: a gradient is linear in what blocks are multiplied with, so that where a device turns
out to be late or lost, the others are asked for the difference; whichever way is complete first is taken.

A device whose gradient does not fit its products is a fault, and then as good as lost.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear import LinearDecoder
from evenkeel.errors import ProtocolError
from evenkeel.training.coded.checks import GradientCheck, picked, suspects
from evenkeel.training.coded.layout import BlockLayout
from evenkeel.training.coded.losses import PredictorLoss
from evenkeel.training.coded.messages import DeviceMessage

__all__ = ["Evaluation", "GradientRound", "RoundSettings", "RoundTask"]

RowSpan = tuple[int, int]  # rows from the first to before the last

_GOOD_CONDITION = 1e3  # with a better one, no further products are waited for
_SPREAD_CONDITION = 100.0  # rows are not shared out among sums that condition worse
_MOST_PARTS = 8  # into which rows are cut
_LEAST_ROWS = 8  # of such a part
_LEAST_WORK = 0.25  # of an ordinary request: smaller ones take as long, since sending takes time, too
_MORE_PATIENT = 1.5  # times: after each time that it was not enough, or work would be given anew faster than it is done
_ROUNDING = 1e-12  # of the largest number: what is smaller is the rounding of a difference that is zero


@dataclass(frozen=True)
class RoundSettings:
    """Says how a round goes.

    Attributes:
        optimistic: devices hold labels and send their gradient at once.
        patience: how much longer than its work should take, by what half of the devices took, a request is waited for,
            as a share. Higher saves work when devices are late by chance, lower saves time when they are slow.
        least_wait_s: such waiting is never shorter.
        slack: how many more blocks are asked for than are missing, where their rows cannot be shared out: better
            conditioned, and one may be late.
        precision: smallest relative difference of the devices' numbers.
    """

    optimistic: bool = True
    patience: float = 0.3
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


@dataclass(frozen=True)
class _OpenRequest:
    """Holds a request that is not answered yet: which rows of which blocks, whose gradient comes with their products,
    and until when it is not late.
    """

    device: str
    kind: Literal["step", "pull"]
    rows: dict[str, list[RowSpan]]
    gradient_of: frozenset[str]
    work: float  # of an ordinary request, a partition multiplied both ways
    sent_s: float
    patience: float  # how many times as long as the first requests it may take


@dataclass
class _Pull:
    """Holds what a device was to multiply its blocks' transposes with, and what came of it."""

    device: str
    shares: dict[str, FloatArray]
    gradient: FloatArray | None = None


@dataclass(frozen=True)
class _PullPlan:
    """Holds a way to the whole gradient: gradients that devices send of their own, and pulls that add the rest."""

    covered: frozenset[str]
    decoded: tuple[str, ...]
    pulls: frozenset[int]
    condition: float


class GradientRound:
    """Runs one round: give it what happens, send what it gives.

    Args:
        task: what is wanted.
        layout: which device holds which block.
        settings: how.
        check: compares gradients with known products.
        present: devices that are there.
        slow: those that the last two rounds did not wait for: this one does not, either.
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
        self._own, self._sums = frozenset(layout.partitions), frozenset(layout.sums)
        self._length = max(layout.rows) if task.rows is None else len(task.rows)
        self._alive = set(present)
        self.late = set(slow) & self._alive
        self._ticket, self._began_s = ticket, now
        self._open: dict[int, _OpenRequest] = {}
        self._asked: dict[str, list[RowSpan]] = {}
        self._had: dict[str, list[RowSpan]] = {}
        self._products: dict[str, FloatArray] = {}  # zero where rows were not asked for
        self._gradients: dict[str, tuple[frozenset[str], FloatArray]] = {}
        self._slopes: dict[str, FloatArray] = {}  # of what was solved for
        self._costs: dict[str, float] = {}
        self._replied: set[str] = set()
        self._pulls: dict[int, _Pull] = {}
        self._plans: list[_PullPlan] = []
        self._chosen: tuple[object, dict[RowSpan, list[str]] | None] = (None, None)  # the last choice, and for what
        self._needed: frozenset[str] = frozenset()  # partitions whose products that choice waits for
        self._inspected = not task.inspect
        self._timeouts = 0
        self._unit_s = 0.0  # how long half of the devices take for an ordinary request, once that is known
        self._units: list[float] = []
        self.due_s: float | None = None
        self.result: Evaluation | None = None
        self.faults: dict[str, str] = {}
        self.lacking: list[tuple[str, str]] = []

    # What happens.

    def begin(self) -> list[tuple[str, DeviceMessage]]:
        """Gives the first requests."""
        further = self._eager()
        # Whose gradient will have to be corrected for what is missing sends it later, corrected.
        waiting = set() if self._task.inspect else self._touched(further)
        requests = []
        for device in sorted(self._alive):
            requests += self._ask_products(device, further, self._began_s, device not in waiting)
        return requests + self._advance(self._began_s)

    def reply(self, device: str, message: DeviceMessage, now: float) -> list[tuple[str, DeviceMessage]]:
        """Takes a reply; gives what is to be asked next."""
        ticket = message.fields.get("ticket")
        sent = self._open.get(ticket)  # type: ignore[arg-type]
        if sent is None or sent.device != device or device not in self._alive or self.result is not None:
            return []
        del self._open[ticket]  # type: ignore[arg-type]
        if message.kind == "error":
            lacking = [block for block in sent.rows if block in message.fields.get("lacking", ())]
            if not lacking:
                return self._fault(device, f"it could not do its work: {message.fields.get('text')}", now)
            self.lacking += [(device, block) for block in lacking]
            return self.lost(device, now)
        try:
            if sent.kind == "step":
                complaint = self._take_products(sent, message)
            else:
                complaint = self._take_pull(int(ticket), message)  # type: ignore[arg-type]
        except ProtocolError as error:
            complaint = str(error)
        if complaint:
            return self._fault(device, complaint, now)
        self._replied.add(device)
        if not self._unit_s:
            self._units.append((now - sent.sent_s) / sent.work)
            if 2 * len(self._units) >= len(self._alive - self.late):
                self._unit_s = median(self._units)
        return self._advance(now)

    def lost(self, device: str, now: float) -> list[tuple[str, DeviceMessage]]:
        """Does without a device that is gone; what it sent before still counts."""
        self._alive.discard(device)
        self._replied.discard(device)
        self._forget({ticket for ticket, sent in self._open.items() if sent.device == device})
        for block in self._layout.held_by({device}):
            self._asked[block] = list(self._had.get(block, ()))
        return self._advance(now)

    def joined(self, device: str, now: float) -> list[tuple[str, DeviceMessage]]:
        """Asks a device that is there again."""
        if self.result is not None or device in self.faults:
            return []
        requests = self.lost(device, now)
        self._alive.add(device)
        self.late.discard(device)
        further = {block: [self._whole(block)] for block in self._layout.sums} if self._task.inspect else {}
        return requests + self._ask_products(device, further, now)

    def timeout(self, now: float) -> list[tuple[str, DeviceMessage]]:
        """Waits no longer for devices that are late."""
        self.late |= {sent.device for sent in self._open.values() if self._late_s(sent) <= now}
        self._timeouts += self._chosen[0] is not None
        return self._advance(now)

    def missing(self) -> list[str]:
        """Names the partitions whose gradients are not there, and that the devices that are there do not tell."""
        covered = self._covered()
        return [block for block in self._layout.untold(self._layout.held_by(self._alive)) if block not in covered]

    # Rows of blocks.

    def _rows_of(self, block: str) -> int:
        return self._layout.rows_of(block) if self._task.rows is None else self._length

    def _whole(self, block: str) -> RowSpan:
        return 0, self._rows_of(block)

    def _within(self, spans: Mapping[str, list[RowSpan]], block: str, span: RowSpan) -> bool:
        """Tells whether a block's rows of a span are among others; beyond its last row all are zero, and known."""
        first, end = span[0], min(span[1], self._rows_of(block))
        return first >= end or any(low <= first and end <= high for low, high in spans.get(block, ()))

    def _full(self, block: str) -> bool:
        return self._within(self._had, block, self._whole(block))

    def _pieces(self) -> list[RowSpan]:
        """Cuts the rows where what was asked for of a sum begins or ends."""
        cuts = {0, self._length}
        for block in self._sums & self._asked.keys():
            cuts |= {cut for span in self._asked[block] for cut in span if cut < self._rows_of(block)}
        return list(pairwise(sorted(cuts)))

    # Requests.

    def _eager(self) -> dict[str, list[RowSpan]]:
        """Gives the rows of further blocks that are asked for at once, since some partitions will be missing."""
        layout = self._layout
        if self._task.inspect:
            return {block: [self._whole(block)] for block in layout.sums}
        quick = layout.held_by(self._alive - self.late)
        missing = [block for block in layout.partitions if block not in quick]
        wanted: dict[str, list[RowSpan]] = {}
        if missing:
            for span, blocks in self._spread((0, self._length), quick, missing).items():
                for block in self._sums.intersection(blocks):
                    wanted.setdefault(block, []).append(span)
        return wanted

    def _touched(self, further: Collection[str]) -> set[str]:
        """Names the devices that hold further blocks, or a partition in them."""
        layout = self._layout
        blocks = set(further)
        for block in further:
            row = layout.code.rows[layout.place[block]]
            blocks |= {layout.blocks[place] for place in np.flatnonzero(row)}
        return {layout.holders[block] for block in blocks}

    def _request(
        self,
        device: str,
        kind: Literal["step", "pull"],
        rows: dict[str, list[RowSpan]],
        arrays: dict[str, Array],
        now: float,
        with_loss: bool = False,
    ) -> tuple[int, tuple[str, DeviceMessage]]:
        ticket = self._ticket()
        counts = {block: sum(high - low for low, high in spans) for block, spans in rows.items()}
        held = self._layout.held_by({device})
        usual = max(self._rows_of(block) for block in self._own.intersection(held) or held)
        gradient_of = self._own.intersection(rows) if with_loss else frozenset[str]()
        work = (sum(counts.values()) + sum(counts[block] for block in gradient_of)) / (2 * usual)
        self._open[ticket] = _OpenRequest(
            device, kind, rows, gradient_of, max(work, _LEAST_WORK), now, _MORE_PATIENT**self._timeouts
        )
        if self._task.rows is not None:
            arrays["rows"] = self._task.rows
        fields: dict[str, object] = {
            "ticket": ticket,
            "round": self._task.number,
            "training": self._task.training,
            "blocks": {block: self._layout.versions[block] for block in rows},
        }
        partial = {block: spans for block, spans in rows.items() if spans != [self._whole(block)]}
        if partial:
            fields["spans"] = partial
        if with_loss:
            fields |= {"loss": self._task.loss.name, "classes": self._task.classes}
        return ticket, (device, DeviceMessage(kind, fields, arrays))

    def _ask_products(
        self, device: str, further: Mapping[str, list[RowSpan]], now: float, with_loss: bool = True
    ) -> list[tuple[str, DeviceMessage]]:
        """Asks for a device's partitions, and for rows of further blocks, as far as it was not asked before."""
        rows: dict[str, list[RowSpan]] = {}
        own = 0
        for block in self._layout.held_by({device}):
            if block in self._own:
                if block not in self._had and not self._asked.get(block):
                    rows[block] = [self._whole(block)]
                    own += 1
                continue
            spans = [(low, min(high, self._rows_of(block))) for low, high in further.get(block, ())]
            spans = _merged(span for span in spans if not self._within(self._asked, block, span))
            if spans:
                rows[block] = spans
        if not rows:
            return []
        for block, spans in rows.items():
            self._asked[block] = _merged([*self._asked.get(block, ()), *spans])
        with_loss = with_loss and self._settings.optimistic and own > 0
        return [self._request(device, "step", rows, {"w": self._task.weights}, now, with_loss)[1]]

    # Replies.

    def _take_products(self, sent: _OpenRequest, message: DeviceMessage) -> str:
        rows = {block: sum(high - low for low, high in spans) for block, spans in sent.rows.items()}
        found = {block: _float64(message, f"z{block}", count) for block, count in rows.items()}
        products = {}
        for block, values in found.items():
            if sent.rows[block] == [self._whole(block)]:
                products[block] = values
                continue
            before = self._products.get(block)
            product = np.zeros(self._rows_of(block)) if before is None else before.copy()
            place = 0
            for low, high in sent.rows[block]:
                product[low:high] = values[place : place + high - low]
                place += high - low
            products[block] = product
        if sent.gradient_of:
            gradient = _float64(message, "gradient", len(self._task.weights))
            slopes = {}
            for block in sent.gradient_of:
                slopes[block], self._costs[block] = self._slope(block, products[block])
            complaint = self._check.complaint(gradient, slopes, products, self._task.weights, self._task.rows)
            if complaint:
                return complaint
            self._gradients[sent.device] = (sent.gradient_of, gradient)
        self._products |= products
        for block, spans in sent.rows.items():
            self._had[block] = _merged([*self._had.get(block, ()), *spans])
        return ""

    def _slope(self, block: str, product: FloatArray) -> tuple[FloatArray, float]:
        """Gives the derivative of the loss by the products, and the loss itself; rows beyond the last count nothing."""
        task = self._task
        labels = picked(task.labels[block], task.rows)
        count = len(task.labels[block])
        slope, cost = task.loss.slope_and_cost(product, labels)
        if task.rows is not None:
            beyond = task.rows >= count
            slope[beyond] = cost[beyond] = 0.0
        return slope, float(cost.sum())

    def _take_pull(self, ticket: int, message: DeviceMessage) -> str:
        gradient = _float64(message, "gradient", len(self._task.weights))
        pull = self._pulls[ticket]
        complaint = self._check.complaint(gradient, pull.shares, self._products, self._task.weights, self._task.rows)
        if not complaint:
            pull.gradient = gradient
        return complaint

    def _fault(self, device: str, complaint: str, now: float) -> list[tuple[str, DeviceMessage]]:
        """Does without a device that erred, and without what it sent and what was solved for with it."""
        self.faults[device] = complaint
        for block in self._layout.held_by({device}):
            self._products.pop(block, None)
            self._had.pop(block, None)
        self._gradients.pop(device, None)
        self._forget({ticket for ticket, pull in self._pulls.items() if pull.device == device})
        self._plans.clear()
        self._slopes.clear()
        return self.lost(device, now)

    def _forget(self, tickets: set[int]) -> None:
        """Does without replies to these requests."""
        for ticket in tickets:
            self._open.pop(ticket, None)
            pull = self._pulls.get(ticket)
            if pull is not None and (pull.gradient is None or pull.device in self.faults):
                del self._pulls[ticket]
        self._plans = [plan for plan in self._plans if plan.pulls <= self._pulls.keys()]

    # What comes next.

    def _covered(self) -> frozenset[str]:
        return frozenset().union(*(blocks for blocks, _ in self._gradients.values()))

    def _late_s(self, sent: _OpenRequest) -> float:
        """Gives when a request is late: after so much longer than its work should take."""
        usual_s = sent.work * self._unit_s
        patient_s = max(self._settings.least_wait_s, self._settings.patience * usual_s)
        return sent.sent_s + (usual_s + patient_s) * sent.patience

    def _advance(self, now: float) -> list[tuple[str, DeviceMessage]]:
        if self.result is not None:
            return []
        requests = self._next(now)
        self.due_s = None
        if self.result is None and self._unit_s:
            waited = [self._late_s(sent) for sent in self._open.values() if sent.device not in self.late]
            self.due_s = min(waited, default=None)
        return requests

    def _next(self, now: float) -> list[tuple[str, DeviceMessage]]:
        layout = self._layout
        steps = [sent for sent in self._open.values() if sent.kind == "step" and sent.device not in self.late]
        if not self._inspected and not steps:
            self._inspected = True
            fault = self._inspect()
            if fault:
                return self._fault(fault, "its products do not fit the code", now)
        covered = self._covered()
        settled = covered.union(*(sent.gradient_of for sent in steps))
        missing = [block for block in layout.partitions if block not in settled]
        requests = []
        if missing and not self._is_planned(settled):
            requests = self._recover(settled, missing, now)
        if self._inspected:
            plans = self._plans if len(covered) < len(layout.rows) else [_PullPlan(covered, (), frozenset(), 1.0)]
            for plan in plans:
                given = all(self._pulls[ticket].gradient is not None for ticket in plan.pulls)
                if given and plan.covered <= covered:
                    self._finish(plan, now)
                    return []
        return requests

    def _is_planned(self, settled: frozenset[str]) -> bool:
        """Tells whether there is a plan that waits for no device that is late."""
        return any(
            plan.covered <= settled
            and not any(
                self._pulls[ticket].gradient is None and self._pulls[ticket].device in self.late
                for ticket in plan.pulls
            )
            for plan in self._plans
        )

    def _inspect(self) -> str:
        """Gives the device whose products do not fit the code; empty where all fit.

        Raises:
            ProtocolError: they do not fit, and the device at fault is not known.
        """
        whole = {block: product for block, product in self._products.items() if self._full(block)}
        found = suspects(self._layout, whole, self._settings.precision)
        if found is None:
            return ""
        if len(found) != 1:
            whose = f"one of {', '.join(found)}" if found else "more than one device"
            raise ProtocolError(
                f"round {self._task.number}: products do not fit the code, and what is wrong may be {whose}; "
                "look at these devices' memory and data, or exclude one of them"
            )
        return found[0]

    def _recover(self, settled: frozenset[str], missing: list[str], now: float) -> list[tuple[str, DeviceMessage]]:
        situation = (frozenset(self.late), frozenset(self._alive), tuple(missing))
        requests = []
        if self._chosen[0] != situation:
            target = self._target(missing)
            self._chosen = (situation, target)
            wanted: dict[str, list[RowSpan]] = {}
            self._needed = self._own & {block for blocks in (target or {}).values() for block in blocks}
            for span, blocks in (target or {}).items():
                for block in blocks:
                    wanted.setdefault(block, []).append(span)
            for device in sorted({self._layout.holders[block] for block in wanted}):
                requests += self._ask_products(device, wanted, now)
        target = self._chosen[1]
        if target is None:
            return []  # who is missing must come back, or reply after all
        if not self._needed <= self._had.keys():
            return requests
        known = {}
        for span, blocks in target.items():
            known[span] = [block for block in blocks if self._within(self._had, block, span)]
            if len(known[span]) < len(blocks) and not self._may_tell(known[span], missing):
                return requests
            if self._untold(known[span]).intersection(missing):
                return requests
            if len(known[span]) < len(blocks) and self._condition(known[span]) > _GOOD_CONDITION:
                return requests
        return requests + self._make_plan(settled, missing, known, now)

    def _target(self, missing: list[str]) -> dict[RowSpan, list[str]] | None:
        """Chooses blocks from which what is missing follows, for all rows: of devices that are not late if possible."""
        for devices in (self._replied - self.late, self._alive - self.late, self._alive):
            held = self._layout.held_by(devices)
            target: dict[RowSpan, list[str]] = {}
            for span in self._pieces():
                asked = [block for block in held if self._within(self._asked, block, span)]
                if self._untold(asked).intersection(missing):
                    target |= self._spread(span, held, missing, asked)
                else:
                    target[span] = self._relevant(asked, missing)
            if all(target.values()):
                return target
        return None

    def _spread(
        self, span: RowSpan, held: list[str], missing: list[str], asked: Collection[str] = ()
    ) -> dict[RowSpan, list[str]]:
        """Cuts rows into parts and chooses blocks for each that tell what is missing, no sum twice: so more devices
        share the work. No blocks where all that is held does not tell it.
        """
        if self._untold(held).intersection(missing):
            return {span: []}
        most = min(_MOST_PARTS, max(1, (span[1] - span[0]) // _LEAST_ROWS))
        there, parts = list(held), list[list[str]]()
        while len(parts) < most:
            names = self._chosen_of(there, slack=0)
            used = names.intersection(self._sums).difference(asked)
            if not used or self._untold(names).intersection(missing) or self._condition(names) > _SPREAD_CONDITION:
                break
            parts.append(self._relevant([block for block in held if block in names or block in asked], missing))
            there = [block for block in there if block not in used]
        if len(parts) < 2:
            names = self._chosen_of(held, self._settings.slack)
            few = [block for block in held if block in names or block in asked]
            parts = [held if self._untold(few).intersection(missing) else self._relevant(few, missing)]
        cuts = [span[0] + (span[1] - span[0]) * part // len(parts) for part in range(len(parts) + 1)]
        return dict(zip(pairwise(cuts), parts, strict=True))

    def _chosen_of(self, blocks: list[str], slack: int) -> set[str]:
        layout = self._layout
        return {layout.blocks[place] for place in layout.code.choose((layout.place[each] for each in blocks), slack)}

    def _relevant(self, blocks: list[str], missing: list[str]) -> list[str]:
        """Leaves out partitions that are neither missing nor in one of the sums: they say nothing about the others."""
        wanted = self._inside(blocks).union(missing, self._sums)
        return [block for block in blocks if block in wanted]

    def _inside(self, blocks: Collection[str]) -> set[str]:
        """Names the partitions in these blocks' sums."""
        layout = self._layout
        places = [layout.place[block] for block in blocks if block in self._sums]
        return {layout.blocks[place] for place in np.flatnonzero(layout.code.rows[places].any(axis=0))}

    def _may_tell(self, known: list[str], missing: list[str]) -> bool:
        """Tells whether there are as many sums as unknowns, while more is to come: else waiting is right."""
        unknown = self._inside(known).union(missing).difference(known)
        return len(self._sums.intersection(known)) >= len(unknown)

    def _untold(self, blocks: Iterable[str]) -> set[str]:
        return set(self._layout.untold(blocks))

    def _condition(self, blocks: Iterable[str]) -> float:
        return self._layout.code.decoder((self._layout.place[block] for block in blocks), partial=True).condition

    def _make_plan(
        self, settled: frozenset[str], missing: list[str], known: dict[RowSpan, list[str]], now: float
    ) -> list[tuple[str, DeviceMessage]]:
        """Plans which device multiplies what, and asks for what earlier requests do not give already."""
        layout = self._layout
        for block in missing:
            if block not in self._slopes:
                product = self._products[block] if self._full(block) else self._solved(block, known)
                self._slopes[block], self._costs[block] = self._slope(block, product)
        shares: dict[str, FloatArray] = {}
        condition = 1.0
        for (low, high), blocks in known.items():
            sharing = self._sharing(missing, blocks)
            condition = max(condition, sharing.condition)
            for block in missing:
                row, part = sharing.weights[layout.place[block]], self._slopes[block][low:high]
                for column in np.flatnonzero(row):
                    share = shares.setdefault(*self._zeros(layout.blocks[sharing.blocks[column]]))
                    # Cut where the block ends: all its further rows are zero.
                    target = share[low : low + len(part)]
                    target += row[column] * part[: len(target)]
        pulls = {ticket for ticket, pull in self._pulls.items() if pull.device in self._alive - self.late}
        for ticket in pulls:
            for block, given in self._pulls[ticket].shares.items():
                shares.setdefault(*self._zeros(block))
                shares[block] -= given
        noise = 0.0  # of differences, with which alone there are numbers that should be zero
        if pulls:
            noise = _ROUNDING * max(float(np.abs(slope).max(initial=0.0)) for slope in self._slopes.values())
        work: dict[str, dict[str, list[RowSpan]]] = {}
        for block, share in shares.items():
            if noise:
                share[np.abs(share) <= noise] = 0.0
            ends = [(low, min(high, len(share))) for low, high in known]
            spans = _merged((low, high) for low, high in ends if share[low:high].any())
            if spans:
                work.setdefault(layout.holders[block], {})[block] = spans
        requests = []
        for device, rows in work.items():
            arrays = {f"v{block}": _picked_spans(shares[block], spans) for block, spans in rows.items()}
            ticket, request = self._request(device, "pull", rows, arrays, now)
            self._pulls[ticket] = _Pull(device, {block: shares[block] for block in rows})
            pulls.add(ticket)
            requests.append(request)
        decoded = tuple(block for block in missing if not self._full(block))
        self._plans.append(_PullPlan(settled, decoded, frozenset(pulls), condition))
        return requests

    def _zeros(self, block: str) -> tuple[str, FloatArray]:
        return block, np.zeros(self._rows_of(block))

    def _solved(self, block: str, known: dict[RowSpan, list[str]]) -> FloatArray:
        """Gives a partition's products as other blocks' tell them."""
        layout, product = self._layout, np.zeros(self._rows_of(block))
        for (low, high), blocks in known.items():
            target = product[low:high]
            decoder = layout.code.decoder((layout.place[each] for each in blocks), partial=True)
            row = decoder.weights[layout.place[block]]
            for column in np.flatnonzero(row):
                there = self._products.get(layout.blocks[decoder.blocks[column]])
                if there is not None:  # else only rows beyond its last are known
                    part = there[low : low + len(target)]
                    target[: len(part)] += row[column] * part
        return product

    def _sharing(self, missing: list[str], known: list[str]) -> LinearDecoder:
        """Gives the decoder that shares the work: of as few sums as condition well, so that few devices are needed."""
        code, places = self._layout.code, [self._layout.place[block] for block in known]
        few = code.decoder(code.choose(places, slack=0), partial=True)
        if few.condition <= _GOOD_CONDITION and not {self._layout.place[block] for block in missing} & set(few.missing):
            return few
        return code.decoder(places, partial=True)

    def _finish(self, plan: _PullPlan, now: float) -> None:
        gradient = np.zeros(len(self._task.weights))
        for device in sorted(self._gradients, key=self._first_place):
            blocks, part = self._gradients[device]
            if blocks <= plan.covered:
                gradient += part
        for ticket in sorted(plan.pulls):
            pulled = self._pulls[ticket].gradient
            assert pulled is not None
            gradient += pulled
        task = self._task
        if task.rows is None:
            examples = sum(map(len, task.labels.values()))
        else:
            examples = sum(int((task.rows < len(labels)).sum()) for labels in task.labels.values())
        self.late -= self._replied - {sent.device for sent in self._open.values()}
        self.due_s = None
        self.result = Evaluation(
            sum(self._costs[block] for block in self._layout.partitions),
            gradient,
            examples,
            plan.decoded,
            plan.condition,
            now - self._began_s,
        )

    def _first_place(self, device: str) -> int:
        return min(self._layout.place[block] for block in self._gradients[device][0])


def _merged(spans: Iterable[RowSpan]) -> list[RowSpan]:
    """Joins spans of rows that touch each other."""
    merged: list[RowSpan] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _picked_spans(values: FloatArray, spans: list[RowSpan]) -> FloatArray:
    if len(spans) == 1:
        return values[slice(*spans[0])]
    picked: FloatArray = np.concatenate([values[low:high] for low, high in spans])
    return picked


def _float64(message: DeviceMessage, name: str, length: int) -> FloatArray:
    """Gives a reply's numbers, converted once: they are multiplied several times."""
    return message.array(name, length).astype(np.float64, copy=False)
