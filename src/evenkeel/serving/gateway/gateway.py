"""The gateway: one dispatch rule that hides slow replicas behind spares and hedges.

    item ──► least-loaded healthy replica ───────────────► exact answer
      │                                                     ▲ whichever is first
      ├──► waiting ──► idle backup takes the group ──► fill ┤ (from `fill_after` on, if sure enough; exact ones at once)
      │                                                     │
      ├──► after `hedge_after`, if the budget allows ──► another replica
      └──► at the deadline ──► the default answer, or an error

Each item is answered by itself; nothing waits for a group. The code here is plain callbacks on a clock, so the very
same gateway runs on an event loop in production and on a virtual clock in the simulator (`evenkeel.clock`). It knows
nothing of HTTP, sockets or models.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.clock import Clock, Timer
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.code import Answer, Source
from evenkeel.delays.laws import attempt_key
from evenkeel.errors import (
    BackendError,
    ConfigurationError,
    DeadlineError,
    EvenkeelError,
    OverloadedError,
    TooLargeError,
)
from evenkeel.serving.gateway.backups import Offload, inline
from evenkeel.serving.gateway.budget import Budget
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.item import NO_OPTIONS, Item, OnOutcome, Options, Outcome
from evenkeel.serving.gateway.policy import Policy
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.replicas import Replica, Replicas
from evenkeel.serving.gateway.spare_kinds import make_spares
from evenkeel.serving.gateway.stats import Stats, count

__all__ = ["Gateway", "Options", "Outcome"]

# Probes are attempts too, for injected delays, but of no item's own.
_PROBE_ATTEMPT = 1 << 16
# Losses that one item survives; beyond, something is wrong with the item or with the whole fleet.
_MOST_LOSSES = 5
_NEVER = float("inf")
# A client that is sent away is asked to come back no later than this.
_LONGEST_RETRY_AFTER_S = 30.0


class Gateway:
    """Answers items on time although replicas are late.

    Args:
        clock: an asyncio loop, or a virtual clock.
        model: the model that replicas run on single items.
        replicas: workers holding the user's own model.
        backups: workers holding coded models; used when the policy wants fills.
        codes: the codes that backups can run (the smallest that holds what waits is used), or one code that is not
            systematic, which then runs on the replicas.
        policy: what to do about late replicas.
        health: when replicas are ejected.
        max_outstanding: items at the least-loaded replica beyond which new ones are refused (load shedding).
        costs: model name -> cost of one of its passes relative to a replica's, for the count of extra load.
        scores: how the model's scores are to be read.
        offload: runs slow work away from the event loop.

    Raises:
        ConfigurationError: codes that cannot work together, or a default that is no class.
    """

    def __init__(
        self,
        clock: Clock,
        model: str,
        replicas: Sequence[Backend],
        backups: Sequence[Backend] = (),
        codes: Sequence[BackupCode] = (),
        policy: Policy = Policy(),
        *,
        scores: ScoreForm,
        health: HealthSettings = HealthSettings(),
        max_outstanding: int = 64,
        costs: Mapping[str, float] | None = None,
        offload: Offload = inline,
    ) -> None:
        self.policy = policy
        self.stats = Stats()
        self.service_times = LiveQuantiles()
        self.replicas = Replicas(replicas, health, self.service_times, self.stats)
        self.draining = False
        self._clock = clock
        self._model = model
        self._scores = scores
        self._max_outstanding = max_outstanding
        if policy.default_label is not None and policy.default_label >= scores.classes:
            raise ConfigurationError(
                f"policy.default_label: the model has {scores.classes} classes, found {policy.default_label}"
            )
        self._budget = Budget(policy.max_extra_load)
        self._items: dict[int, Item] = {}
        self._next_number = 0
        self._sweeper: Timer | None = None
        self._on_drained: list[Callable[[], object]] = []
        self._spares = make_spares(
            clock,
            policy,
            codes,
            model=model,
            replicas=self.replicas,
            backups=backups,
            service_times=self.service_times,
            stats=self.stats,
            costs=costs or {},
            offload=offload,
            on_answer=self._on_fill,
            on_lost=self._fail,
        )
        # What a code's model is known to do well enough; a request may ask for more.
        self._min_confidences = {code.name: code.min_confidence for code in codes}
        for backend in (*replicas, *backups):
            backend.on_change = self._on_backend_change

    # ---- what the front end calls ----

    @property
    def ready(self) -> bool:
        """True when a new item could be answered."""
        return not self.draining and self.replicas.any_ready

    @property
    def in_flight(self) -> int:
        """Items that have no answer yet."""
        return len(self._items)

    @property
    def deadline_s(self) -> float:
        """Seconds that an item may take in all."""
        return self.policy.deadline_s

    def check_room(self, count: int) -> None:
        """See that `count` items submitted now would all be taken; one alone need not ask.

        Raises:
            TooLargeError: more than the whole fleet may ever hold.
            OverloadedError: more than there is room for now.
        """
        replicas, limit = self.replicas, self._max_outstanding
        copies = min(self.policy.copies, len(replicas.all))
        # The last item is taken where there is room for its first copy.
        tasks = (count - 1) * copies + 1
        most = limit * len(replicas.all)
        if tasks > most:
            raise TooLargeError(f"{count} items; at most {(most - 1) // copies + 1} are taken in one request")
        if tasks <= replicas.room(limit):
            return
        self.stats.shed += count
        if not replicas.any_ready:
            raise OverloadedError("no replica is ready; try again soon")
        longest = max(replica.outstanding for replica in replicas.all)
        raise OverloadedError(f"no room for {count} items at once now; try again later", self._worked_off_s(longest))

    def submit(self, array: Array, on_outcome: OnOutcome, options: Options = NO_OPTIONS, key: int | None = None) -> int:
        """Take one item; returns its ticket. `on_outcome` is called once, later, unless the ticket is cancelled.

        Args:
            array: the item, in the layout of the model's card, without a batch axis.
            on_outcome: called on the clock's thread, never from inside `submit`.
            options: what the request asked for.
            key: names the item for injected delays; its number by default.

        Raises:
            OverloadedError: nobody can take it: all queues are full, or no replica is ready.
        """
        replica = self.replicas.choose()
        if replica is None or replica.outstanding >= self._max_outstanding:
            raise self._shed(replica)
        policy = self.policy
        now = self._clock.time()
        number = self._next_number
        self._next_number = number + 1
        item = Item(number, array, on_outcome, number if key is None else key, now)
        self._items[number] = item
        self.stats.items += 1
        self._budget.earn()
        timeout_s = policy.deadline_s
        if options.timeout_s is not None and options.timeout_s < timeout_s:
            timeout_s = options.timeout_s
        item.deadline_at = now + timeout_s
        if policy.hedge_after is not None:
            item.hedge_at = now + self.service_times.after(policy.hedge_after)
        if options.exact or self._spares.sends_items:
            self._send(item, replica, "exact", now)
            if policy.copies > 1:
                self._send_copies(item, now)
        if not options.exact:
            item.min_confidence = policy.min_confidence if options.min_confidence is None else options.min_confidence
            self._spares.cover(item, now)
        self._set_timer(item)
        if self._sweeper is None:
            self._sweeper = self._clock.call_at(now + self.replicas.sweep_every_s, self._sweep)
        if self.replicas.any_ejected:
            self._probe(item, now)
        return number

    def cancel(self, ticket: int) -> None:
        """Give an item up: its user is gone. Unknown and finished tickets are ignored."""
        item = self._items.get(ticket)
        if item is not None:
            self.stats.abandoned += 1
            self._close(item)

    def start_draining(self, on_drained: Callable[[], object] | None = None) -> None:
        """Say not ready from now on, and call `on_drained` as soon as nothing is in flight."""
        self.draining = True
        if on_drained is not None:
            self._on_drained.append(on_drained)
        if not self._items:
            self._tell_drained()

    # ---- attempts on replicas ----

    def _shed(self, replica: Replica | None) -> OverloadedError:
        """The refusal of an item. `replica` has the shortest queue; None: nobody is ready."""
        self.stats.shed += 1
        if replica is None:
            return OverloadedError("no replica is ready; try again soon")
        # By then even the shortest queue has been worked off, so that there is room for more than one.
        return OverloadedError("all queues are full; try again later", self._worked_off_s(replica.outstanding))

    def _worked_off_s(self, outstanding: int) -> float:
        """When a client is asked to come back that waits for a queue to be worked off."""
        return min(outstanding * (self.service_times.quantile(0.5) or 0.1), _LONGEST_RETRY_AFTER_S)

    def _send(self, item: Item, replica: Replica, source: Source, now: float) -> None:
        attempt = item.attempts
        item.attempts = attempt + 1
        item.tried.append(replica)
        replica.sent(now)
        ticket = replica.backend.submit(
            self._model,
            item.array[None],
            partial(self._on_replica_reply, item, replica, source, now),
            attempt_key(item.key, attempt),
        )
        item.open_attempts.append((replica, ticket))

    def _send_copies(self, item: Item, now: float) -> None:
        for _ in range(self.policy.copies - 1):
            replica = self.replicas.choose(item.tried)
            if replica is not None:
                self.stats.copies += 1
                self._send(item, replica, "exact", now)

    def _on_replica_reply(self, item: Item, replica: Replica, source: Source, sent_s: float, reply: Reply) -> None:
        now = self._clock.time()
        outputs = reply.outputs
        if outputs is not None and not self._are_scores(outputs):
            self.stats.bad_replies += 1
            error = BackendError(f"{replica.backend.name} gave outputs that are no scores: check which model it runs")
            reply, outputs = Reply(error=error), None
        replica.back(now, sent_s, reply)
        attempts = item.open_attempts
        if len(attempts) == 1:
            attempts.clear()
        else:
            item.open_attempts = [pair for pair in attempts if pair[0] is not replica]
        if outputs is None:
            if not reply.cancelled:
                self.stats.lost_attempts += 1
                if not item.done:
                    self._on_loss(item, reply.error, now)
            return
        if item.done:
            self._compare(item, outputs[0])
        else:
            if source == "hedge":
                self.stats.hedges_won += 1
            self._finish(item, self._scores.answer(outputs[0], source), now)
        self._spares.replica_replied(item, outputs)

    def _are_scores(self, outputs: Array) -> bool:
        shape = outputs.shape
        return (
            len(shape) == 2
            and shape[0] == 1
            and shape[1] == self._scores.classes
            and outputs.dtype.kind in "fiu"
            and bool(np.isfinite(outputs).all())
        )

    def _on_loss(self, item: Item, error: EvenkeelError | None, now: float) -> None:
        """An attempt ended in an error, which is not the user's problem unless it happens again and again."""
        item.losses += 1
        if item.losses <= _MOST_LOSSES:
            self._rescue(item, now)
        elif not item.open_attempts and not self._use_fill(item, now):
            self._fail(item, error or BackendError("every attempt was lost"))

    def _rescue(self, item: Item, now: float) -> None:
        """See that an item has an attempt that may still answer: else take its fill, or ask another replica.

        With nobody to ask it stays as it is until a replica is back, a fill comes, or its deadline does.
        """
        if item.done or any(not replica.health.stalled for replica, _ in item.open_attempts):
            return
        if self._use_fill(item, now):
            return
        asked = [replica for replica, _ in item.open_attempts]
        replica = self.replicas.choose(item.tried) or self.replicas.choose(asked)
        # From a stalled replica only to one that shows life: when all fall silent, the fleet is slow, and copies of
        # everything would make it slower.
        if replica is not None and not (asked and replica.silent_s(now) > self.replicas.stall_after_s / 2):
            self.stats.retries += 1
            self._send(item, replica, "exact", now)

    def _rescue_all(self, now: float) -> None:
        self._spares.wake()
        for item in list(self._items.values()):
            if item.attempts:  # else only coded tasks work on it, which its spares look after
                self._rescue(item, now)

    def _on_backend_change(self) -> None:
        self.replicas.refresh()
        if self.replicas.any_ready:
            self._rescue_all(self._clock.time())
        self._spares.wake()

    # ---- late items ----

    def _set_timer(self, item: Item) -> None:
        """Have the earliest of what is still to happen to the item happen."""
        when, action = item.deadline_at, self._on_deadline
        if item.hedge_at < when:
            when, action = item.hedge_at, self._on_hedge_due
        if item.late_at <= when:  # when both are due, the fill is looked at first
            when, action = item.late_at, self._on_late
        item.timer = self._clock.call_at(when, action, item)

    def _on_late(self, item: Item) -> None:
        item.late_at = _NEVER
        item.late = True
        now = self._clock.time()
        if not self._use_fill(item, now):
            self._spares.item_is_late(item)
            if item.unsure:
                self._hedge(item, now)
            self._set_timer(item)

    def _on_hedge_due(self, item: Item) -> None:
        item.hedge_at = _NEVER
        self._hedge(item, self._clock.time())
        self._set_timer(item)

    def _hedge(self, item: Item, now: float) -> None:
        """Ask a second replica, if the policy and the budget allow."""
        policy = self.policy
        if policy.hedge_after is None or policy.copies + item.hedges >= policy.max_attempts:
            return
        replica = self.replicas.choose(item.tried)
        if replica is None:
            return
        if not self._budget.spend():
            self.stats.budget_exhausted += 1
            return
        self.stats.hedges += 1
        item.hedges += 1
        self._send(item, replica, "hedge", now)

    def _on_fill(self, item: Item, answer: Answer, code: str) -> None:
        """A spare tells an answer: keep it for when the item is late, or use it if it need not wait for that."""
        now = self._clock.time()
        exact = answer.source == "exact"
        if not exact and answer.confidence < max(item.min_confidence, self._min_confidences.get(code, 0.0)):
            self._on_unsure(item, now)
            return
        if item.fill is None or exact or answer.confidence > item.fill[0].confidence:
            item.fill = (answer, code)
        if exact or item.late or not item.open_attempts:
            self._use_fill(item, now)

    def _on_unsure(self, item: Item, now: float) -> None:
        """The fill will not do, so a late item need not wait for it any longer."""
        self.stats.unsure_fills += 1
        item.unsure = True
        if item.late:
            self._hedge(item, now)
        if not item.open_attempts:
            self._rescue(item, now)

    def _use_fill(self, item: Item, now: float) -> bool:
        """Answer from the spare, if it has answered."""
        fill = item.fill
        if fill is None:
            return False
        answer, code = fill
        count(self.stats.fills, code)
        self._close(item)
        if answer.source != "exact":
            item.fill = fill  # for the comparison with a late exact reply
        self._answer(item, answer, now)
        return True

    def _compare(self, item: Item, scores: Array) -> None:
        """An exact reply came after a fill was used: the backup's accuracy in production, measured for free."""
        if item.fill is not None:
            answer, _ = item.fill
            item.fill = None
            self.stats.fills_compared += 1
            self.stats.fills_agreed += int(np.argmax(answer.value)) == int(np.argmax(scores))

    def _on_deadline(self, item: Item) -> None:
        self.stats.deadlines += 1
        now = self._clock.time()
        label = self.policy.default_label
        if label is None:
            self._fail(item, DeadlineError(f"no answer within {now - item.since_s:.3g} s"))
            return
        scores = np.zeros(self._scores.classes, dtype=np.float32)
        scores[label] = 1.0
        self._finish(item, Answer(scores, "default", 0.0), now)

    # ---- ends ----

    def _finish(self, item: Item, answer: Answer, now: float) -> None:
        self._close(item)
        self._answer(item, answer, now)

    def _answer(self, item: Item, answer: Answer, now: float) -> None:
        count(self.stats.sources, answer.source)
        item.on_outcome(Outcome(answer, None, now - item.since_s))

    def _fail(self, item: Item, error: EvenkeelError) -> None:
        self.stats.failed += 1
        self._close(item)
        item.on_outcome(Outcome(None, error, self._clock.time() - item.since_s))

    def _close(self, item: Item) -> None:
        """Forget an item: stop its timer and tell its other attempts to stop."""
        item.done = True
        item.fill = None
        if item.timer is not None:
            item.timer.cancel()
        self._spares.forget(item)
        for replica, ticket in item.open_attempts:
            self.stats.cancels += 1
            replica.backend.cancel(ticket)
        del self._items[item.number]
        if self._on_drained and not self._items:
            self._tell_drained()

    def _tell_drained(self) -> None:
        for on_drained in self._on_drained:
            self._clock.call_soon(on_drained)
        self._on_drained.clear()

    # ---- health ----

    def _sweep(self) -> None:
        """Look for stalled nodes; what replicas hold goes to others. Runs while there is anything in flight."""
        self._sweeper = None
        now = self._clock.time()
        for stalled in self.replicas.eject_stalled(now):
            stalled.backend.suspect()
        self._spares.suspect_stalled(now, self.replicas.stall_after_s)
        if self.replicas.any_stalled:
            self._rescue_all(now)
        if self._items:
            self._sweeper = self._clock.call_at(now + self.replicas.sweep_every_s, self._sweep)

    def _probe(self, item: Item, now: float) -> None:
        """Send copies of an item to ejected replicas that are due a look; nobody waits for them."""
        for replica in self.replicas.wanting_probe(now):
            self.stats.probes += 1
            replica.probe_sent(now)
            replica.backend.submit(
                self._model,
                item.array[None],
                partial(self._on_probe_reply, replica, now),
                attempt_key(item.key, _PROBE_ATTEMPT),
            )

    def _on_probe_reply(self, replica: Replica, sent_s: float, reply: Reply) -> None:
        replica.probe_back(self._clock.time(), sent_s, reply)
