"""What does a resize or a rolling restart cost those who send requests meanwhile? How soon is a dead worker replaced?

python benchmarks/fleet.py [--policy collage+hedge] [--delay two-mode:scale=0.3] [--rounds 6] [--deaths 5] [--json FILE]

Nine replicas and a backup, all processes, under an open loop at half of their capacity (Poisson, the same arrivals and
the same delays in each turn). Turns: the fleet left alone; 9 -> 18 -> 9 replicas; a rolling restart of all; a new
version of the model. A turn lasts at least `--seconds`. Latencies count from the moment at which a request was due.
Where no processor is idle, a worker that starts takes time from those that serve: the table says how busy the machine
was.
"""

import asyncio
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import uvloop
from output import show, write_json

from evenkeel.delays.text import parse_delay
from evenkeel.serving.config import read_config
from evenkeel.serving.front.served import ServedModels
from evenkeel.serving.gateway.gateway import Outcome
from evenkeel.serving.hosted import HostedModel
from evenkeel.serving.repository import ModelRepository

_LOAD, _REPLICAS = 0.5, 9
_KEYS = 1 << 20


def _busy_s() -> float:
    """Seconds that all processors have worked since the machine started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Turn:
    """Sends requests to whichever gateway serves the model, and keeps what became of them."""

    def __init__(self, models: ServedModels, rate: float, seed: int) -> None:
        self._models, self._rate = models, rate
        self._random = np.random.default_rng(seed)
        self._item = np.zeros((32, 32, 3), np.uint8)
        self._loop = asyncio.get_running_loop()
        self.latencies_s: list[float] = []
        self.lost, self.open, self.sent = 0, 0, 0

    async def last(self, until: Callable[[], bool]) -> None:
        """Sends until `until()` holds, and waits for all answers."""
        due_s = time.monotonic()
        while not until():
            due_s += self._random.exponential(1 / self._rate)
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self._send(due_s)
        while self.open:
            await asyncio.sleep(0.01)

    def _send(self, due_s: float) -> None:
        self.open += 1
        key = self.sent % _KEYS
        self.sent += 1

        def done(outcome: Outcome) -> None:
            self.open -= 1
            self.lost += outcome.error is not None
            self.latencies_s.append(time.monotonic() - due_s)

        try:
            model = self._models.find("cifar10-base")
            model.gateway.submit(self._item, done, key=key)
        except Exception:  # refused, which is a loss too
            self.open -= 1
            self.lost += 1


async def _turn(
    models: ServedModels, rate: float, seconds: float, change: Callable[[], Awaitable[object]] | None
) -> dict[str, Any]:
    gc.collect()
    gc.freeze()
    turn, busy_s, began_s = Turn(models, rate, seed=1), _busy_s(), time.monotonic()
    work = None if change is None else asyncio.ensure_future(change())
    took: list[float] = []
    if work is not None:
        work.add_done_callback(lambda _: took.append(time.monotonic() - began_s))
    await turn.last(lambda: time.monotonic() - began_s > seconds and (work is None or work.done()))
    if work is not None:
        await work
    elapsed_s = time.monotonic() - began_s
    p50, p99 = np.percentile(turn.latencies_s, [50, 99]) * 1e3
    return {
        "requests": turn.sent,
        "lost": turn.lost,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "change_s": took[0] if took else None,
        "busy": (_busy_s() - busy_s) / elapsed_s / (os.cpu_count() or 1),
    }


async def _measure(policy: str, delay: str, rounds: int, deaths: int, seconds: float) -> list[dict[str, Any]]:
    config = read_config({"replicas": _REPLICAS, "backups": 1, "policy": policy, "delay": delay})
    models = ServedModels()
    repository = ModelRepository(models, config, lambda: config)
    law = parse_delay(delay)
    mean_s = float(np.mean([law.draw(key, 0, 0.0) for key in range(20_000)]))
    rate = _LOAD * _REPLICAS / mean_s
    rows: list[dict[str, Any]] = []

    def fleet() -> Any:
        return repository.hosted[0].fleet

    async def resize() -> None:
        await fleet().resize("replica", 2 * _REPLICAS)
        await fleet().resize("replica", _REPLICAS)

    async def restart() -> None:
        await fleet().restart()

    async def reload() -> None:
        await repository.load("cifar10-base")

    try:
        await repository.start()
        click.echo(f"a task takes {mean_s * 1e3:.1f} ms on average; {rate:.0f} requests a second")
        await _turn(models, rate, 5.0, None)
        turns = {"left alone": None, "9 -> 18 -> 9": resize, "rolling restart": restart, "new version": reload}
        for number in range(rounds):
            for what, change in turns.items():
                row = await _turn(models, rate, seconds, change)
                rows.append({"what": what, "round": number, **row})
                click.echo(f"{what}: {row}")
        for number in range(deaths):
            rows.append({"what": "a worker's death", "round": number, **await _death(repository.hosted[0])})
    finally:
        await repository.close()
    return rows


async def _death(hosted: HostedModel) -> dict[str, float]:
    """Kills a worker; seconds until it gets no work, and until it does again."""
    victim: Any = hosted.fleet.members[0].backend
    began_s, found = time.monotonic(), []
    os.kill(victim.pid, signal.SIGKILL)
    for ready in (False, True):
        while victim.ready is not ready:
            await asyncio.sleep(0.001)
        found.append(time.monotonic() - began_s)
    return {"out_s": found[0], "back_s": found[1]}


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median of the rounds, and of each round's p99 beside that of the fleet left alone."""
    alone = {row["round"]: row["p99_ms"] for row in rows if row["what"] == "left alone"}
    table = []
    for what in dict.fromkeys(row["what"] for row in rows):
        of_it = [row for row in rows if row["what"] == what]
        keys = [key for key in of_it[0] if key not in ("what", "round", "lost", "requests")]
        medians = {key: float(np.median([row[key] for row in of_it])) for key in keys if of_it[0][key] is not None}
        if "p99_ms" in medians:
            medians["p99_ratio"] = float(np.median([row["p99_ms"] / alone[row["round"]] for row in of_it]))
            medians |= {key: sum(row[key] for row in of_it) for key in ("requests", "lost")}
        table.append({"what": what, **medians})
    return table


@click.command(help=__doc__)
@click.option("--policy", default="collage+hedge", show_default=True)
@click.option("--delay", default="two-mode:scale=0.3", show_default=True, help="Injected into every worker.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--deaths", type=click.IntRange(0), default=5, show_default=True)
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Of a turn, at least.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(policy: str, delay: str, rounds: int, deaths: int, seconds: float, json_file: Path | None) -> None:
    rows = uvloop.run(_measure(policy, delay, rounds, deaths, seconds))
    show(
        "Changes of a fleet under load (medians of the rounds; to reach: none lost, p99 within 1.1 times of alone, "
        "out in 1 s, back in 5 s)",
        _table(rows),
        {
            "what": ("", ""),
            "requests": ("requests", ",.0f"),
            "lost": ("lost", ".0f"),
            "p50_ms": ("p50 ms", ".1f"),
            "p99_ms": ("p99 ms", ".1f"),
            "p99_ratio": ("p99 / alone", ".2f"),
            "change_s": ("change s", ".1f"),
            "busy": ("busy", ".0%"),
            "out_s": ("out s", ".3f"),
            "back_s": ("back s", ".2f"),
        },
    )
    write_json(json_file, {"policy": policy, "delay": delay, "rounds": rounds, "seconds": seconds}, rows)


if __name__ == "__main__":
    main()
