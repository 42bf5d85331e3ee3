"""Hides slow replicas behind spares and hedges, by one dispatch rule.

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

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.clock import Clock, Timer
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.code import Answer, Source
from evenkeel.delays.laws import attempt_key
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    DeadlineError,
    EvenkeelError,
    OverloadedError,
    PoisonItemError,
    RequestError,
    TaskRefusedError,
    TooLargeError,
)
from evenkeel.promises.promise import NEVER
from evenkeel.serving.gateway.backups import Offload, inline
from evenkeel.serving.gateway.budget import Budget, Rationed
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.item import NO_OPTIONS, Item, OnOutcome, Options, Outcome
from evenkeel.serving.gateway.node import Attempt, Node
from evenkeel.serving.gateway.poison import PoisonMemory
from evenkeel.serving.gateway.policy import Policy
from evenkeel.serving.gateway.probes import Probes
from evenkeel.serving.gateway.promise_gate import Grant, PromiseGate
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.replicas import Replica, Replicas, described
from evenkeel.serving.gateway.spare_kinds import make_spares
from evenkeel.serving.gateway.stats import FAILED, Stats, count, measure
from evenkeel.serving.gateway.suspects import Suspects

__all__ = ["Gateway", "NodeKind", "Options", "Outcome"]

NodeKind = Literal["replica", "backup"]

# Passes that may fail on one item. With the second, something is wrong with the item or with the whole fleet, and more
# attempts would only spread it.
_MAX_FAILURES = 2
_MAX_ATTEMPTS = 20  # on one item, whatever became of them
_RETURN_S = 10.0  # after an item may have broken the last worker: clients are not sent away so soon
_MAX_WORKERS = 2  # that may have an item at once, beside what a large fleet can spare
_LEFT_EVERY_S = 0.01  # a look at whether a node that leaves has finished
_NEVER = float("inf")
_MAX_SCORE = float(np.finfo(np.float32).max)  # answers are FP32
_log = logging.getLogger(__name__)
# The longest wait that a refused client is given before it tries again.
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
        pass_limit_s: longest time of one task at a worker, once those before it are done; beyond, it counts as lost.
        costs: model name -> cost of one of its passes relative to a replica's, for the count of extra load.
        scores: how the model's scores are to be read.
        offload: runs slow work away from the event loop.
        promises: decides when a light model may answer; None: nothing can be promised.
        backups_join: backups will join later, where there are none now.
        stats: counters to go on with, of the gateway whose place this one takes; by default new ones.

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
        pass_limit_s: float = 30.0,
        costs: Mapping[str, float] | None = None,
        offload: Offload = inline,
        promises: PromiseGate | None = None,
        backups_join: bool = False,
        stats: Stats | None = None,
    ) -> None:
        self.policy = policy
        self.stats = Stats() if stats is None else stats
        self.service_times = LiveQuantiles()
        self.replicas = Replicas(replicas, health, self.service_times, self.stats, pass_limit_s, self._on_rest)
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
        self._hedges = Rationed(self._budget, self._hedge_gain_s, self._send_hedge)
        # With one token an item, all of those in flight may be answered so at once.
        share = policy.max_approximate if policy.max_approximate < 1 else _NEVER
        self._approximate = Rationed(Budget(share), self._fill_gain_s, self._answer_by_fill)
        self.promises = promises
        self._items: dict[int, Item] = {}
        self._next_number = 0
        self._sweeper: Timer | None = None
        self._probes = Probes(
            clock,
            model,
            self.replicas,
            self.stats,
            self._checked,
            lambda: self._next_number,
            self._keep_sweeping,
            self._rescue_all,
        )
        self._suspects = Suspects(clock, self.replicas, self._send_again, self._probes.check)
        self._poison = PoisonMemory()
        self._broken_at_s = -_NEVER  # when a worker was last lost while it was at work on an item
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
            pass_limit_s=pass_limit_s,
            costs=costs or {},
            offload=offload,
            on_answer=self._on_fill,
            on_lost=self._fail,
            on_pass_over=self._on_pass_over,
            escalate=self._escalate,
            may_add_worker=self._may_add_worker,
            approximate=self._approximate.budget,
            backups_join=backups_join,
        )
        # What a code's model is known to do well enough; a request may ask for more.
        self._min_confidences = {code.name: code.min_confidence for code in codes}
        for backend in (*replicas, *backups):
            backend.on_change = self._on_backend_change

    # ---- what the front end calls ----

    @property
    def ready(self) -> bool:
        """Tells whether a new item could be answered.

        A replica is ready, and its passes do not keep failing; or a light model may answer in its place.
        """
        alone = self.policy.degrade and self._spares.answers_alone
        return not self.draining and (self.replicas.any_ready or alone)

    @property
    def backups(self) -> Sequence[Node]:
        """Gives the workers that hold coded models."""
        return self._spares.nodes

    @property
    def budgets(self) -> dict[str, Budget]:
        """Gives the budgets of hedges and of approximate answers."""
        return {"hedge": self._budget, "approximate": self._approximate.budget}

    @property
    def in_flight(self) -> int:
        """Counts the items that have no answer yet."""
        return len(self._items)

    @property
    def deadline_s(self) -> float:
        """Gives the seconds that an item may take in all."""
        return self.policy.deadline_s

    @property
    def max_items(self) -> int:
        """Gives the number of items beyond which a request is more than the whole fleet may ever hold."""
        replicas = max(1, len(self.replicas.all))
        # The last item is taken where there is room for its first copy.
        return (self._max_outstanding * replicas - 1) // min(self.policy.copies, replicas) + 1

    def check_room(self, count: int) -> None:
        """Raises an error unless `count` items submitted now would all be taken; not needed for one alone.

        Raises:
            TooLargeError: more than the whole fleet may ever hold.
            OverloadedError: more than there is room for now.
        """
        replicas, limit = self.replicas, self._max_outstanding
        if count > self.max_items:
            raise TooLargeError(f"a request may hold at most {self.max_items} items, found {count}")
        tasks = (count - 1) * min(self.policy.copies, len(replicas.all)) + 1
        if tasks <= (replicas.room(limit) if replicas.any_usable else self._spares.room(limit) or self._room_to_wait()):
            return
        if self.policy.degrade and self._spares.answers_alone and tasks <= self._spares.room(limit):
            return
        if not replicas.any_usable:
            raise self._shed(None, count)
        self.stats.shed += count
        longest = max((replica.outstanding for replica in replicas.all), default=0)
        raise OverloadedError(f"no room for {count} items at once now; try again later", self._worked_off_s(longest))

    def submit(self, array: Array, on_outcome: OnOutcome, options: Options = NO_OPTIONS, key: int | None = None) -> int:
        """Takes one item and gives its ticket. Calls `on_outcome` once, later, unless the ticket is cancelled.

        Args:
            array: the item, in the layout of the model's card, without a batch axis.
            on_outcome: called on the clock's thread, never from inside `submit`.
            options: of the request.
            key: names the item for injected delays; its number by default.

        Raises:
            OverloadedError: nobody can take it: all queues are full, or no replica is ready.
            RequestError: it wants a promise that cannot be shown.
        """
        grant = self._granted(options)
        policy = self.policy
        degrade = not options.exact and (policy.degrade if options.degrade is None else options.degrade)
        replica = self.replicas.choose()
        if replica is None or (degrade and self._spares.answers_alone):
            if not self._spares.room(self._max_outstanding) and not self._room_to_wait():
                raise self._shed(replica)
        elif replica.outstanding >= self._max_outstanding:
            raise self._shed(replica)
        now = self._clock.time()
        number = self._next_number
        self._next_number = number + 1
        item = Item(number, array, on_outcome, number if key is None else key, now)
        self._items[number] = item
        self.stats.items += 1
        self._hedges.earn()
        self._approximate.earn()
        timeout_s = policy.deadline_s
        if options.timeout_s is not None and options.timeout_s < timeout_s:
            timeout_s = options.timeout_s
        item.exact = options.exact
        item.degrade = degrade
        item.grant = grant
        if self.promises is not None and policy.light_first:
            item.audited = self.promises.chooses_audit()
        item.deadline_at = now + timeout_s
        if policy.hedge_after is not None:
            item.hedge_at = now + self.service_times.after(policy.hedge_after)
        if self._poison.holds(array, now):
            item.suspect = item.tried_again = True
            item.failures = _MAX_FAILURES
            self._clock.call_soon(self._rescue, item, now)
        elif replica is None:
            item.min_confidence = self._threshold(options, grant)
            self._spares.stand_in(item)
        elif options.exact or self._spares.sends_items:
            self._send(item, replica, "exact", now)
            if policy.copies > 1:
                self._send_copies(item, now)
        item.min_confidence = self._threshold(options, grant)
        if replica is not None and not item.suspect:
            self._spares.cover(item, now)
        self._set_timer(item)
        self._keep_sweeping()
        if self.replicas.any_ejected:
            self._probes.send(item.array, item.key, now)
        return number

    def _granted(self, options: Options) -> Grant | None:
        """Gives what the request's promise gets, before anything is done for it."""
        if self.promises is not None and self.policy.light_first and not options.exact:
            return self.promises.grant(options.promise, options.loss, options.max_cost)
        if options.promise is not None:
            raise RequestError(f"{options.promise}: cannot be shown: this server has no certificate for a light model")
        return None

    def _threshold(self, options: Options, grant: Grant | None) -> float:
        if grant is not None:
            return grant.threshold
        if options.min_confidence is not None:
            return options.min_confidence
        # With a certificate, what nothing is promised for goes to the accurate model.
        return NEVER if self.promises is not None and self.policy.light_first else self.policy.min_confidence

    def cancel(self, ticket: int) -> None:
        """Gives an item up: its user is gone. Ignores unknown and finished tickets."""
        item = self._items.get(ticket)
        if item is not None:
            self.stats.abandoned += 1
            self._close(item)

    def start_draining(self, on_drained: Callable[[], object] | None = None) -> None:
        """Says not ready from now on, and calls `on_drained` as soon as nothing is in flight."""
        self.draining = True
        if on_drained is not None:
            self._on_drained.append(on_drained)
        if not self._items:
            self._tell_drained()

    def watch(self, sample: Array) -> None:
        """Has every replica that becomes ready from now on do a pass on `sample` before it counts as ready.

        Ejected replicas are probed with it too, also without traffic, so that the fleet is ready again when they are.
        """
        self._probes.sample = sample
        self.replicas.joined(self._clock.time(), True)
        self._probes.plan()

    # ---- nodes that come and go ----

    def check_join(self, name: str, kind: NodeKind) -> None:
        """Raises an error unless a node of that name may join.

        Raises:
            ConfigurationError: the name is taken, or there is no use for backups.
        """
        if self._node(name) is not None:
            raise ConfigurationError(f"{name} cannot join: a node of that name is here already")
        if kind == "backup":
            self._spares.check_add(name)

    def join(self, backend: Backend, kind: NodeKind = "replica", *, tried: bool = False) -> None:
        """Takes in one more node.

        Args:
            backend: the node; its name must be new here.
            kind: whether it is a replica or a backup.
            tried: it has shown that it can do a pass, so a replica gets items at once. Others are tried first.

        Raises:
            ConfigurationError: the name is taken, or there is no use for backups.
        """
        self.check_join(backend.name, kind)
        if kind == "replica":
            self.replicas.add(backend, self._clock.time(), tried)
        else:
            self._spares.add(backend)
        backend.on_change = self._on_backend_change
        self._on_backend_change()

    def retire(self, name: str, limit_s: float, on_left: Callable[[int], object]) -> None:
        """Gives a node no more work, and lets go of it when it has none.

        Args:
            name: of the node.
            limit_s: longest wait for the tasks that it has; others do them then.
            on_left: called with the number of those, at once or later; the gateway does not use the backend any more.

        Raises:
            ConfigurationError: there is no such node.
        """
        node = self._node(name)
        if node is None:
            raise ConfigurationError(f"no node is called {name!r}")
        now = self._clock.time()
        if isinstance(node, Replica):
            self.replicas.retire(node, now)
        else:
            self._spares.retire(node)
        self._let_go(node, now + limit_s, on_left)
        self._rescue_all(now)  # items that wait there for a replica to be back

    def _node(self, name: str) -> Node | None:
        nodes = (*self.replicas.all, *self._spares.nodes)
        return next((node for node in nodes if node.backend.name == name), None)

    def _let_go(self, node: Node, until_s: float, on_left: Callable[[int], object]) -> None:
        now = self._clock.time()
        if node.occupied and now < until_s:
            self._clock.call_at(min(now + _LEFT_EVERY_S, until_s), self._let_go, node, until_s, on_left)
            return
        tasks = node.abandon()
        if isinstance(node, Replica):
            self.replicas.remove(node, now)
        else:
            self._spares.remove(node)
        node.backend.on_change = lambda: None
        on_left(tasks)

    # ---- attempts on replicas ----

    def _shed(self, replica: Replica | None, count: int = 1) -> OverloadedError:
        """Makes the refusal of `count` items. `replica` has the shortest queue; None: no replica can take them."""
        self.stats.shed += count
        if replica is None:
            rested_at_s = self.replicas.rested_at_s()
            if rested_at_s is None:
                return OverloadedError("no replica is ready; try again soon")
            wait_s = min(max(rested_at_s - self._clock.time(), 0.0), _LONGEST_RETRY_AFTER_S)
            return OverloadedError("no replica has room; try again later", wait_s)
        # By then even the shortest queue has been worked off, so that there is room for more than one.
        return OverloadedError("all queues are full; try again later", self._worked_off_s(replica.outstanding))

    def _room_to_wait(self) -> int:
        """Counts the items that may wait for workers that an item may have broken, which are back within seconds."""
        replicas = self.replicas
        if replicas.any_connected or not self._spares.sends_items or self._clock.time() > self._broken_at_s + _RETURN_S:
            return 0
        return max(0, self._max_outstanding * len(replicas.all) - len(self._items))

    def _worked_off_s(self, outstanding: int) -> float:
        """Gives the seconds until a queue is worked off, after which a refused client may try again."""
        return min(outstanding * (self.service_times.quantile(0.5) or 0.1), _LONGEST_RETRY_AFTER_S)

    def _send(self, item: Item, replica: Replica, source: Source, now: float) -> None:
        attempt = item.attempts
        item.attempts = attempt + 1
        item.tried.append(replica)
        on_reply = partial(self._on_replica_reply, item, source)
        key = attempt_key(item.key, attempt)
        item.open_attempts.append(replica.submit(self._model, item.array[None], key, now, on_reply, item))

    def _send_again(self, item: Item, replica: Replica, now: float) -> Attempt:
        self.stats.retries += item.attempts > 0
        self._send(item, replica, "exact", now)
        return item.open_attempts[-1]

    def _escalate(self, item: Item) -> None:
        """Sends an item to a replica that was only at the light model, or nowhere; it waits if none is there."""
        self.stats.escalated += 1
        self._rescue(item, self._clock.time())

    def _send_copies(self, item: Item, now: float) -> None:
        for _ in range(self.policy.copies - 1):
            replica = self.replicas.choose(item.tried)
            if replica is not None:
                self.stats.copies += 1
                self._send(item, replica, "exact", now)

    def _on_replica_reply(self, item: Item, source: Source, attempt: Attempt, reply: Reply) -> None:
        now = self._clock.time()
        replica: Replica = attempt.node
        reply = self._checked(replica, reply)
        replica.back(now, attempt.since_s, reply, attempt.expired)
        attempts = item.open_attempts
        if len(attempts) == 1:
            attempts.clear()
        else:
            attempts.remove(attempt)
        if item.suspect:
            self._suspects.over(attempt)
        outputs = reply.outputs
        if reply.lost and item.exact and outputs is not None:
            reply, outputs = Reply(error=BackendError(f"{reply.lost:.0%} of the image did not arrive there")), None
        if outputs is None:
            if not reply.cancelled:
                self.stats.lost_attempts += 1
                if not isinstance(reply.error, BackendLostError) or reply.began:
                    name = replica.backend.name
                    _log.warning("%s could not do an item: %s", name, described(reply.error), extra={"backend": name})
                if not item.done:
                    self._on_loss(item, attempt, reply, now)
            return
        if source == "hedge" and not item.done:
            self.stats.hedges_won += 1
        if reply.lost:
            if not item.done:
                self._answer_concealed(item, outputs[0], reply.lost, now)
            return
        if item.done:
            self._compare(item, outputs[0], now)
        else:
            if item.light is not None:
                self._audited(item, item.light, outputs[0])
            self._finish(item, self._scores.answer(outputs[0], source), now)
        self._spares.replica_replied(item, outputs)

    def _answer_concealed(self, item: Item, scores: Array, lost: float, now: float) -> None:
        """Answers an item that reached the replica in part, with what the certificate promises for that loss."""
        answer = self._scores.answer(scores, "concealed")
        if item.grant is not None and self.promises is not None:
            found = self.promises.at_loss(item.grant, lost)
            if found is None:
                item.grant.failed()
            elif item.light is not None and item.light.confidence >= found.threshold:
                answer = item.light
            item.grant = found
        self._finish(item, answer, now)

    def _checked(self, replica: Replica, reply: Reply) -> Reply:
        """Gives the reply, or an error in its place if its outputs are no scores."""
        outputs = reply.outputs
        if outputs is None or self._are_scores(outputs):
            return reply
        self.stats.bad_replies += 1
        return Reply(
            error=BackendError(f"{replica.backend.name} gave outputs that are no scores: check which model it runs")
        )

    def _are_scores(self, outputs: Array) -> bool:
        shape = outputs.shape
        return (
            len(shape) == 2
            and shape[0] == 1
            and shape[1] == self._scores.classes
            and outputs.dtype.kind in "fiu"
            and bool(np.isfinite(outputs).all())
            and (outputs.dtype.itemsize <= 4 or bool(np.abs(outputs).max() <= _MAX_SCORE))
        )

    def _on_loss(self, item: Item, attempt: Attempt, reply: Reply, now: float) -> None:
        """Handles an attempt that ended in an error; the item is tried elsewhere unless it caused the error itself."""
        error = reply.error or BackendError("a task failed, and its worker gave no reason")
        if isinstance(error, TaskRefusedError):
            if not self._use_fill(item, now):
                self._fail(item, error)
        elif not isinstance(error, BackendLostError):
            item.failures += 1
            item.error = error
            self._retry(item, now)
        else:
            # An item that only waited where a worker was lost goes elsewhere as if nothing had happened.
            if reply.began:
                self._broken_at_s = now
            if reply.began and not attempt.blamed:
                self._blame(item, attempt, error, now)
            self._rescue(item, now)

    def _blame(self, item: Item, attempt: Attempt, error: EvenkeelError, now: float) -> None:
        """Notes that a worker died or stopped answering while it worked on the item, which may be the reason."""
        attempt.blamed = True
        item.failures += 1
        item.error = error
        item.suspect = True
        item.blamed_at_s = now
        self._spares.forget(item)  # or a backup might be next, and others' items with it

    def _retry(self, item: Item, now: float) -> None:
        """Tries an item once more on which a pass failed.

        It costs nothing at a replica whose last pass was good, since only few of those can fail in a row. Elsewhere it
        takes from the hedges' budget: a fleet that fails as a whole must not get more work.
        """
        if item.open_attempts:
            return
        replica = self.replicas.choose(item.tried, well=True)
        if item.failures < _MAX_FAILURES and replica is None:
            replica = self.replicas.choose(item.tried) or self.replicas.choose()
            if replica is None and not isinstance(item.error, BackendBusyError):
                self._rescue(item, now)  # waits for a replica to be back
                return
            if replica is not None and not self._budget.spend():
                self.stats.budget_exhausted += 1
                replica = None
        if item.failures >= _MAX_FAILURES or replica is None:
            if item.failures < _MAX_FAILURES:
                self._spares.stand_in(item)
            item.failures = _MAX_FAILURES
            self._give_up(item, now)
        elif not self._use_fill(item, now):
            self._send_again(item, replica, now)

    def _give_up(self, item: Item, now: float) -> None:
        """Answers an item by its error, as soon as nothing is under way that may answer it."""
        if item.open_attempts or self._use_fill(item, now) or self._spares.may_answer(item):
            return
        error: EvenkeelError
        if item.suspect:
            if item.attempts:  # it was tried, and not only remembered
                self._poison.add(item.array, now)
            error = PoisonItemError(
                f"workers were lost while they were at work on this item, {item.failures} times, so it is not tried "
                "again for a minute; the server's log has the details"
            )
        elif isinstance(item.error, BackendBusyError):
            wait_s = 1.0 if item.error.retry_after_s is None else item.error.retry_after_s
            error = OverloadedError("no replica has room; try again later", min(wait_s, _LONGEST_RETRY_AFTER_S))
        else:
            error = BackendError("no replica could do this item; the server's log has the reasons")
        error.__cause__ = item.error
        self._fail(item, error)

    def _rescue(self, item: Item, now: float) -> None:
        """Uses the item's fill or tries another replica, if no attempt may still answer it.

        With nobody to ask it stays as it is until a replica is back, a fill comes, or its deadline does.
        """
        if item.done or any(not attempt.node.health.stalled for attempt in item.open_attempts):
            return
        if self._use_fill(item, now) or item.cross_check_open:
            return
        if item.suspect and not item.cleared and not item.tried_again and self._is_frozen(item):
            self._clear(item)
        if item.suspect and not item.tried_again and item.failures + item.lost_a_pass >= _MAX_FAILURES:
            self._cross_check(item, now)
            return
        if item.failures >= _MAX_FAILURES or item.attempts >= _MAX_ATTEMPTS:
            self._give_up(item, now)
            return
        if item.suspect:
            if not self._degrade(item):
                self._suspects.add(item, now)
            return
        busy = [attempt.node for attempt in item.open_attempts]
        replica = self.replicas.choose(item.tried) or self.replicas.choose(busy)
        no_use = replica is None or replica.health.stalled or replica.outstanding >= self._max_outstanding
        if no_use and not self._rest_ends_before(item.deadline_at) and self._degrade(item):
            return
        if replica is None:
            if not item.open_attempts:
                self._spares.stand_in(item)
            return
        # From a stalled replica only to one that shows life: when all fall silent, the fleet is slow, and copies of
        # everything would make it slower.
        if not (busy and replica.silent_s(now) > self.replicas.stall_after_s / 2):
            self._send_again(item, replica, now)
        else:
            self._spares.stand_in(item)

    def _rest_ends_before(self, moment_s: float) -> bool:
        """Tells whether a replica that has no room now will have some by then."""
        rested_at_s = self.replicas.rested_at_s()
        return rested_at_s is not None and self._clock.time() < rested_at_s < moment_s

    def _degrade(self, item: Item) -> bool:
        """Gives the light model's answer, of which it was not sure, if the request takes that in place of none."""
        if not item.degrade or item.light is None:
            return False
        self._finish(item, replace(item.light, source="degraded"), self._clock.time())
        return True

    def _cross_check(self, item: Item, now: float) -> None:
        """Judges an item with which two workers were lost at the same time, neither of them in a second attempt.

        Either the item broke both, or the whole fleet was killed or froze. So another replica does a blank pass: if it
        can, the item is to blame; if not, a backup may take it. In that case, and without another replica, the item has
        a second attempt as any suspect has.
        """
        replica = None if item.cross_checked else self.replicas.choose(item.tried)
        item.cross_checked = True
        if replica is None or replica.health.stalled:
            item.failures = 1
            self._suspects.add(item, now)
        else:
            item.cross_check_open = True
            self._probes.check(item, replica, partial(self._on_cross_checked, item))

    def _on_cross_checked(self, item: Item, fleet_is_well: bool) -> None:
        item.cross_check_open = False
        if item.done:
            return
        now = self._clock.time()
        if fleet_is_well:
            self._suspects.forget(item)
            item.failures = _MAX_FAILURES
            item.tried_again = True
            self._give_up(item, now)
        else:
            self._clear(item)
            self._suspects.add(item, now)

    def _clear(self, item: Item) -> None:
        """Lets a backup take a suspect: what happened to its worker happens to others without it."""
        item.failures = 1
        item.cleared = True
        self._spares.stand_in(item)

    def _is_frozen(self, item: Item) -> bool:
        """Tells whether all replicas are silent, and one of them over something else than the item."""
        if not self.replicas.all_stalled:
            return False
        replicas = (*self.replicas.all, *self.replicas.leaving)
        heads = [replica.at_work for replica in replicas if replica.health.stalled]
        return any(head and not any(attempt.item is item for attempt in head) for head in heads)

    def _rescue_all(self, now: float) -> None:
        self._spares.wake()
        for item in list(self._items.values()):
            # Where only coded tasks work on an item, its spares look after it.
            if item.attempts or self._spares.sends_items:
                self._rescue(item, now)
        self._suspects.go_on()

    def _on_backend_change(self) -> None:
        now = self._clock.time()
        self.replicas.joined(now, self._probes.sample is not None)
        self.replicas.refresh(now)
        self._probes.plan()
        self._rescue_all(now)

    def _on_rest(self, until_s: float) -> None:
        """Sets a timer for when a replica has room again; items that wait for one go on then."""
        self._clock.call_at(until_s, self._on_backend_change)

    # ---- late items ----

    def _set_timer(self, item: Item) -> None:
        """Sets the item's timer to the earliest of its coming events."""
        if item.timer is not None:
            item.timer.cancel()
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
        now = self._clock.time()
        trigger = self.policy.hedge_after
        if trigger is not None and trigger.auto and not self._budget.plenty:
            # The last tokens are for those that gain most.
            scarce_at = item.since_s + self.service_times.after(trigger, scarce=True)
            if now < scarce_at:
                item.hedge_at = scarce_at
        if item.hedge_at == _NEVER:
            if item.passes:
                self._spares.item_is_late(item)
            self._hedge(item, now)
        self._set_timer(item)

    def _hedge(self, item: Item, now: float) -> None:
        """Asks a further replica, if the policy allows, now or as soon as the budget does."""
        if self._may_hedge(item):
            if self._hedges.spend(item):
                self._send_hedge(item)
            else:
                self.stats.budget_exhausted += 1

    def _may_hedge(self, item: Item) -> bool:
        policy = self.policy
        if policy.hedge_after is None or policy.copies + item.hedges >= policy.max_attempts:
            return False
        if item.failures or item.lost_alone or (item.fill is not None and not item.late):
            return False  # what has a fill is answered as soon as it is late
        if not self._may_add_worker(item):
            return False
        return self.replicas.choose(item.tried) is not None

    def _may_add_worker(self, item: Item) -> bool:
        """Tells whether one more worker may have an item: one that hangs takes every worker with it that has it.

        Two may. A third gains little where few tasks are slow; where many are it keeps the p99 out of the slow mode.
        So large fleets have it: up to a third of the healthy replicas, and none since an item was at fault.
        """
        workers, replicas = item.workers, self.replicas
        if item.suspect or workers < _MAX_WORKERS:
            return item.cleared or not item.suspect
        return (
            workers < replicas.healthy / 3
            and not replicas.any_stalled
            and not self._poison.holds_any(self._clock.time())
        )

    def _hedge_gain_s(self, item: Item) -> float:
        """Gives the seconds that a hedge is expected to gain."""
        if not self._may_hedge(item):
            return 0.0
        median_s = self.service_times.quantile(0.5) or 0.0
        return self.service_times.left_s(self._clock.time() - item.since_s) - median_s

    def _send_hedge(self, item: Item) -> None:
        replica = self.replicas.choose(item.tried)
        if replica is None:
            return
        now = self._clock.time()
        self.stats.hedges += 1
        item.hedges += 1
        self._send(item, replica, "hedge", now)
        trigger = self.policy.hedge_after
        if trigger is not None and self.policy.copies + item.hedges < self.policy.max_attempts:
            item.hedge_at = now + self.service_times.after(trigger, scarce=True)  # the hedge may be late too
            self._set_timer(item)

    def _on_fill(self, item: Item, answer: Answer, code: str) -> None:
        """Keeps a spare's answer until the item is late, or uses it now if it need not wait."""
        now = self._clock.time()
        exact = answer.source == "exact"
        if not exact and answer.confidence < max(item.min_confidence, self._min_confidences.get(code, 0.0)):
            if answer.source == "edge":
                item.light = answer
                self.stats.escalated += 1
            self._on_unsure(item, now)
            return
        if item.fill is None or exact or answer.confidence > item.fill[0].confidence:
            item.fill = (answer, code)
        if exact or item.late or not item.open_attempts:
            self._use_fill(item, now)

    def _on_unsure(self, item: Item, now: float) -> None:
        """Notes that the fill is not sure enough, so that a late item waits for it no longer."""
        self.stats.unsure_fills += 1
        item.unsure = True
        if item.late:
            self._hedge(item, now)
        if not item.open_attempts:
            self._rescue(item, now)

    def _on_pass_over(self, item: Item) -> None:
        """Goes on with an item that has no answer although the last spare that worked on it has replied."""
        now = self._clock.time()
        if not item.open_attempts:
            self._rescue(item, now)
        elif item.late and item.hedge_at == _NEVER and item.fill is None and not item.unsure:
            self._hedge(item, now)  # the backup gave no answer, and is no longer in the way of another replica

    def _use_fill(self, item: Item, now: float) -> bool:
        """Answers from the spare, if it has replied."""
        fill = item.fill
        if fill is None:
            return False
        if fill[0].source != "exact" and not self._approximate.spend(item):
            self.stats.fills_over_budget += 1
            self._hedge(item, now)
            return False
        self._answer_by_fill(item)
        return True

    def _fill_gain_s(self, item: Item) -> float:
        """Gives the seconds that the fill, which is there, is expected to gain."""
        return self.service_times.left_s(self._clock.time() - item.since_s)

    def _answer_by_fill(self, item: Item) -> None:
        fill = item.fill
        if fill is None:
            return
        now = self._clock.time()
        answer, code = fill
        count(self.stats.fills, code)
        self._close(item)
        if answer.source != "exact":
            item.fill = fill  # for the comparison with a late exact reply
            item.filled_at_s = now
        self._answer(item, answer, now)
        if item.audited and answer.source == "edge":
            replica = self.replicas.choose()
            if replica is not None:
                self._send(item, replica, "exact", now)

    def _compare(self, item: Item, scores: Array, now: float) -> None:
        """Compares an exact reply with the fill that was used: this measures the backup's accuracy in production."""
        if item.fill is not None:
            answer, _ = item.fill
            item.fill = None
            self._audited(item, answer, scores)
            if answer.source != "edge":  # a replica that is asked afterwards would have been no later
                self.stats.saved_times.add(now - item.filled_at_s)
            self.stats.fills_compared += 1
            self.stats.fills_agreed += int(np.argmax(answer.value)) == int(np.argmax(scores))

    def _audited(self, item: Item, light: Answer, scores: Array) -> None:
        """Compares both models' answers to an item that was chosen for it."""
        if item.audited and self.promises is not None:
            agree = int(np.argmax(light.value)) == int(np.argmax(scores))
            self.stats.audits += 1
            self.stats.audits_agreed += agree
            if item.grant is not None:
                self.promises.audited(item.grant, light.confidence, agree)

    def _on_deadline(self, item: Item) -> None:
        self.stats.deadlines += 1
        now = self._clock.time()
        label = self.policy.default_label
        if label is None or (item.degrade and item.light is not None):
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
        latency_s = now - item.since_s
        measure(self.stats.latencies, answer.source, latency_s)
        certificate = "" if item.grant is None else item.grant.covers(answer.source)
        item.on_outcome(Outcome(answer, None, latency_s, certificate))

    def _fail(self, item: Item, error: EvenkeelError) -> None:
        if self._degrade(item):
            return
        self.stats.failed += 1
        if item.grant is not None:
            item.grant.failed()
        self._close(item)
        latency_s = self._clock.time() - item.since_s
        measure(self.stats.latencies, FAILED, latency_s)
        item.on_outcome(Outcome(None, error, latency_s))

    def _close(self, item: Item) -> None:
        """Removes an item: stops its timer and cancels its other attempts."""
        item.done = True
        item.fill = None
        if item.timer is not None:
            item.timer.cancel()
        self._spares.forget(item)
        self._hedges.forget(item)
        self._approximate.forget(item)
        if item.suspect:
            self._suspects.forget(item)
        for attempt in item.open_attempts:
            self.stats.cancels += 1
            attempt.cancel()
        del self._items[item.number]
        if self._on_drained and not self._items:
            self._tell_drained()

    def _tell_drained(self) -> None:
        for on_drained in self._on_drained:
            self._clock.call_soon(on_drained)
        self._on_drained.clear()

    # ---- health ----

    def _sweep(self) -> None:
        """Finds stalled nodes and lost tasks and gives their items to others; repeats while anything is under way."""
        self._sweeper = None
        now = self._clock.time()
        replicas, spares = self.replicas, self._spares
        for stalled in replicas.eject_stalled(now):
            stalled.backend.suspect()
            for attempt in stalled.at_work:
                if attempt.item is not None and not attempt.item.done and not attempt.blamed:
                    silent = BackendLostError(f"{stalled.backend.name} stopped replying")
                    self._blame(attempt.item, attempt, silent, now)
                    self._suspects.over(attempt)
        replicas.expire(now)
        spares.sweep(now, replicas.stall_after_s)
        self._probes.plan()
        if replicas.any_stalled:
            self._rescue_all(now)
        else:
            self._suspects.go_on()  # a replica may have shown meanwhile that it is well
        if self._items or replicas.any_outstanding or spares.busy:
            self._sweeper = self._clock.call_at(now + replicas.sweep_every_s, self._sweep)

    def _keep_sweeping(self) -> None:
        if self._sweeper is None:
            self._sweeper = self._clock.call_at(self._clock.time() + self.replicas.sweep_every_s, self._sweep)
