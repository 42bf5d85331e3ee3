"""A gateway on a virtual clock with scripted replicas, so that a test reads as a scenario."""

import numpy as np

from evenkeel.backends.delayed import Delayed
from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import VirtualClock
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.replicate import Replicate
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.delays.laws import Constant
from evenkeel.serving.gateway.gateway import Gateway, Options
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.policy import Policy, Trigger, preset

CLASSES = 10
FORM = ScoreForm(CLASSES)
GRIDS = (Replicate(FORM), Collage(2, 1, FORM, model="c2"), Collage(3, 1, FORM, model="c3"))
BOTH_AT_ONE_AND_A_HALF = Trigger(fixed_s=1.5)


def picture(number):
    """A picture of one pixel whose class is `number` modulo 10."""
    return np.full((1, 1, 3), number % 256, dtype=np.uint8)


def true_scores(numbers, height=10.0):
    rows = np.zeros((len(numbers), CLASSES), dtype=np.float32)
    rows[np.arange(len(numbers)), np.asarray(numbers) % CLASSES] = height
    return rows


def answer(model, inputs, height=10.0):
    """What a perfect model gives; a collage model is right in every cell, and as sure as `height` makes it."""
    numbers = inputs.reshape(-1, 3)[:, 0].astype(int)
    return true_scores(numbers) if model == "classifier" else true_scores(numbers, height)[None]


class Late(Constant):
    """Every task takes a second; tasks of the workers in `slow` take `slow_s`."""

    def __init__(self, slow=(), slow_s=10.0):
        super().__init__(1.0)
        object.__setattr__(self, "slow", dict.fromkeys(slow, slow_s))

    def draw(self, key, worker, now_s):
        return self.slow.get(worker, 1.0)


class Scene:
    """Three replicas and a backup that take a second for a task, as long as the script says nothing else."""

    def __init__(
        self,
        policy="collage+hedge",
        replicas=3,
        backups=1,
        codes=GRIDS,
        health=HealthSettings(),
        height=10.0,
        max_outstanding=64,
        offload=None,
        gateway=Gateway,
        **changes,
    ):
        self.clock = VirtualClock()
        if isinstance(policy, str) and policy == "collage+hedge":
            changes = {"fill_after": BOTH_AT_ONE_AND_A_HALF, "hedge_after": BOTH_AT_ONE_AND_A_HALF, **changes}
            changes.setdefault("max_extra_load", 1.0)
        self.policy = policy if isinstance(policy, Policy) else preset(policy, **changes)
        self.delay = Late()
        self.fakes = [
            FakeBackend(f"node{number}", self.clock, lambda model, inputs: answer(model, inputs, height))
            for number in range(replicas + backups)
        ]
        self.nodes = [Delayed(fake, self.clock, self.delay, number) for number, fake in enumerate(self.fakes)]
        extra = {} if offload is None else {"offload": offload}
        self.gateway = gateway(
            self.clock,
            "classifier",
            self.nodes[:replicas],
            self.nodes[replicas:],
            codes if backups or not codes or not codes[0].systematic else (),
            self.policy,
            health=health,
            max_outstanding=max_outstanding,
            scores=ScoreForm(CLASSES),
            **extra,
        )
        self.outcomes = {}
        self.sent = 0

    @property
    def stats(self):
        return self.gateway.stats

    @property
    def backup(self):
        return self.fakes[-1]

    def slow(self, *workers, seconds=10.0):
        for worker in workers:
            self.delay.slow[worker] = seconds

    def send(self, count=1, **options):
        """Send items; the n-th item of the scene shows picture n. Gives the tickets."""
        tickets = []
        for _ in range(count):
            number = self.sent
            self.sent += 1

            def done(outcome, number=number):
                assert number not in self.outcomes, f"item {number} has two outcomes"
                self.outcomes[number] = outcome

            tickets.append(self.gateway.submit(picture(number), done, Options(**options)))
        return tickets

    def later(self, seconds, call, *arguments):
        self.clock.call_at(seconds, call, *arguments)

    def run(self, until_s=float("inf")):
        self.clock.run(until_s)
        return self

    @property
    def sources(self):
        return [self.outcomes[number].answer.source for number in sorted(self.outcomes)]

    @property
    def latencies(self):
        return [round(self.outcomes[number].latency_s, 6) for number in sorted(self.outcomes)]

    def assert_everything_answered(self):
        assert sorted(self.outcomes) == list(range(self.sent))
        for number, outcome in self.outcomes.items():
            assert outcome.error is None
            assert int(np.argmax(outcome.answer.value)) == number % 256 % CLASSES

    def assert_nothing_left(self):
        """Call after `run`: no item, no task, and (since `run` came back) no timer is left."""
        assert self.gateway.in_flight == 0
        assert [replica.outstanding for replica in self.gateway.replicas.all] == [0] * len(self.gateway.replicas.all)
