"""Runs the gateway on a virtual clock: the same code, with fake workers whose times follow a law.

Nothing waits, so an hour of traffic takes seconds, and equal seeds give equal results on every machine. Items are
pictures of one pixel that carries their number; the fake models read it back, so encoding and decoding are the real
ones too. A fake Collage-CNN agrees with the fake classifier on a given share of its cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.delayed import Delayed
from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import VirtualClock
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.replicate import Replicate
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.delays.laws import Delay
from evenkeel.errors import OverloadedError
from evenkeel.figures.records import RequestRecord
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.item import Outcome
from evenkeel.serving.gateway.policy import Policy
from evenkeel.serving.gateway.stats import Stats

__all__ = ["Fleet", "arrivals", "simulate"]

_CLASSES = 10


@dataclass(frozen=True)
class Fleet:
    """Describes what serves: how many nodes of which kind, and how good and how costly the coded models are."""

    replicas: int = 9
    backups: int = 1
    grids: tuple[int, ...] = (1, 2, 3)  # 1 is the replicas' own model
    costs: tuple[float, ...] = (1.0, 0.6, 0.6)  # of one pass of each grid, relative to a replica's
    agreement: float = 0.9  # of a collage's cells with the classifier
    max_outstanding: int = 100_000


def arrivals(rate_per_s: float, requests: int, seed: int, batch: int = 1) -> Array:
    """Draws the times `[requests]`, in seconds, at which requests come: Poisson, or Poisson batches as in the paper."""
    batches = -(-requests // batch)
    gaps = np.random.default_rng([seed, 0xA881]).exponential(batch / rate_per_s, batches)
    times: Array = np.repeat(np.cumsum(gaps), batch)[:requests]
    return times


def simulate(
    policy: Policy,
    delay: Delay,
    times_s: Sequence[float] | Array,
    fleet: Fleet = Fleet(),
    health: HealthSettings = HealthSettings(),
    seed: int = 0,
) -> tuple[list[RequestRecord], Stats]:
    """Sends one item through the gateway at each of `times_s`; gives what became of each, and the gateway's counts.

    Args:
        policy: what the gateway does about late replicas.
        delay: how long tasks take; workers 0..replicas-1 are replicas, backups come behind.
        times_s: arrivals, ascending.
        fleet: the nodes.
        health: when replicas are ejected.
        seed: of the fake collage's mistakes.
    """
    clock = VirtualClock()
    scores = ScoreForm(_CLASSES)
    codes: list[BackupCode] = []
    costs: dict[str, float] = {}
    for grid, cost in zip(fleet.grids, fleet.costs, strict=True):
        codes.append(Replicate(scores) if grid == 1 else Collage(grid, 1, scores, model=f"collage{grid}"))
        costs[codes[-1].model] = cost
    wrong = np.random.default_rng([seed, 0xC011]).random(len(times_s)) >= fleet.agreement

    def answer(model: str, inputs: Array) -> Array:
        pixels = inputs.reshape(-1, 3).astype(np.int64)
        numbers = pixels[:, 0] << 16 | pixels[:, 1] << 8 | pixels[:, 2]
        labels = numbers % _CLASSES
        if model != "classifier":
            labels = (labels + wrong[numbers % len(wrong)]) % _CLASSES
        rows = np.zeros((len(numbers), _CLASSES), dtype=np.float32)
        rows[np.arange(len(numbers)), labels] = 10.0
        return rows if model == "classifier" else rows[None]

    nodes = [
        Delayed(FakeBackend(f"node{number}", clock, answer), clock, delay, number, costs)
        for number in range(fleet.replicas + fleet.backups)
    ]
    gateway = Gateway(
        clock,
        "classifier",
        nodes[: fleet.replicas],
        nodes[fleet.replicas :],
        codes,
        policy,
        health=health,
        max_outstanding=fleet.max_outstanding,
        costs=costs,
        scores=scores,
    )
    records: list[RequestRecord] = []

    def arrive(number: int) -> None:
        item = np.array([number >> 16 & 255, number >> 8 & 255, number & 255], dtype=np.uint8).reshape(1, 1, 3)
        now = clock.time()
        if number + 1 < len(times_s):
            clock.call_at(float(times_s[number + 1]), arrive, number + 1)

        def done(outcome: Outcome) -> None:
            given = outcome.answer
            records.append(
                RequestRecord(
                    number=number,
                    intended_s=now,
                    sent_s=now,
                    done_s=clock.time(),
                    status=200 if given else outcome.error.http_status if outcome.error else 500,
                    source=given.source if given else "",
                    confidence=given.confidence if given else float("nan"),
                    label=int(np.argmax(given.value)) if given else None,
                    truth=number % _CLASSES,
                    error=str(outcome.error) if outcome.error else None,
                )
            )

        try:
            gateway.submit(item, done, key=number)
        except OverloadedError as error:
            done(Outcome(None, error, 0.0))

    if len(times_s):
        clock.call_at(float(times_s[0]), arrive, 0)
    clock.run()
    records.sort(key=lambda record: record.number)
    return records, gateway.stats
