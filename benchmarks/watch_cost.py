"""What watching costs: the histograms of an item, a scrape, a frame of the live page, tracing that is off and on.

    python benchmarks/watch_cost.py
    python benchmarks/watch_cost.py --url http://127.0.0.1:8000   # while it is under load

Times of one thread's processor; the best of several rounds, since whatever else runs only adds. The gateway's own cost
an item is measured by the simulator's gateway on a virtual clock with fake workers, so that nothing else is in it.
"""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from output import show, write_json

from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import VirtualClock
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.models import shipped
from evenkeel.models.cards import load_card
from evenkeel.serving.front.request_times import RequestTimes
from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.gateway import stats as stats_module
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.histogram import Histogram
from evenkeel.serving.gateway.policy import preset
from evenkeel.serving.gateway.stats import Stats, measure
from evenkeel.serving.live.feed import LiveFeed
from evenkeel.serving.metrics import Metrics

ROUNDS = 7


def best_us(work: Callable[[], Any], count: int) -> float:
    """Microseconds of one of the `count` pieces that `work` does, in the best round."""
    times = []
    for _ in range(ROUNDS):
        began_s = time.thread_time()
        work()
        times.append(time.thread_time() - began_s)
    return min(times) / count * 1e6


def histograms_us() -> float:
    """All that an ordinary item pays: request, item, wait and service."""
    requests, stats, count = RequestTimes(), Stats(), 20_000
    seconds = np.random.default_rng(1).lognormal(-4, 1, count).tolist()

    def work() -> None:
        for each in seconds:
            requests.add(200, each)
            measure(stats.latencies, "exact", each)
            stats.queue_times.add(each)
            stats.service_times.add(each)

    return best_us(work, count)


def make_gateway(make: Callable[..., Gateway] = Gateway) -> tuple[Gateway, VirtualClock]:
    clock, scores = VirtualClock(), ScoreForm(10)
    answer = np.zeros((1, 10), np.float32)
    replicas = [FakeBackend(f"replica-{n}", clock, lambda model, inputs: answer) for n in range(9)]
    gateway = make(clock, "model", replicas, (), (), preset("none"), scores=scores, max_outstanding=1 << 20)
    return gateway, clock


def gateway_us(make: Callable[..., Gateway] = Gateway) -> float:
    gateway, clock = make_gateway(make)
    item, count = np.zeros((1, 1, 3), np.uint8), 5_000

    def work() -> None:
        for _ in range(count):
            gateway.submit(item, lambda outcome: None)
            clock.run()

    return best_us(work, count)


def without_histograms_us() -> float:
    """The same with histograms that count nothing: what is left is calls."""
    kept, kept_measure = Histogram.add, stats_module.measure
    import evenkeel.serving.gateway.gateway as gateway_module

    try:
        Histogram.add = lambda self, seconds: None  # type: ignore[method-assign]
        gateway_module.measure = lambda times, name, seconds: None
        return gateway_us()
    finally:
        Histogram.add = kept  # type: ignore[method-assign]
        gateway_module.measure = kept_measure


def traced(sample: float) -> Callable[..., Gateway]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    from evenkeel.serving.gateway.traced import TracedGateway
    from evenkeel.serving.tracing import OtelTracer

    spans = TracerProvider(sampler=TraceIdRatioBased(sample), shutdown_on_exit=False).get_tracer("benchmark")
    return lambda *given, **named: TracedGateway(OtelTracer(spans), *given, **named)


class Nobody:
    def begin(self, status: int, headers: bytes) -> None:
        pass

    def send(self, part: bytes) -> None:
        pass


def cold_us(work: Callable[[], Any]) -> float:
    """The same once in a while, after other work: what it needs is in no cache then."""
    other = np.random.default_rng(0).random(4 << 20)
    times = []
    for _ in range(30):
        other.sort()
        other[:] = other[::-1]
        began_s = time.thread_time()
        work()
        times.append(time.thread_time() - began_s)
    return sorted(times)[len(times) // 2] * 1e6


def page_share(url: str, seconds: float) -> dict[str, float]:
    """What a running server says that its live page costs it, with one viewer: this one."""
    until_s = time.monotonic() + seconds
    cost: dict[str, float] = {}
    with urllib.request.urlopen(f"{url}/live", timeout=10) as feed:
        for line in feed:
            if line.startswith(b"data: "):
                cost = json.loads(line[6:])["cost"] or {}
                if time.monotonic() > until_s:
                    break
    return cost


@click.command(help=__doc__)
@click.option("--url", help="Server under load, of which to ask what its live page costs it.")
@click.option("--seconds", default=60.0, show_default=True, help="How long to watch it.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File for the rows.")
def main(url: str | None, seconds: float, json_path: Path | None) -> None:
    gateway, clock = make_gateway()
    for _ in range(1000):
        gateway.submit(np.zeros((1, 1, 3), np.uint8), lambda outcome: None)
        clock.run()
    model = ServedModel("model", "1", load_card(shipped.card_path("cifar10-base")), gateway)
    for status in (200, 400, 503, 504):
        model.times.add(status, time.monotonic())
    scrape = Metrics([model])
    feed = LiveFeed(lambda: [model], lambda: clock)
    found = {
        "histograms, an item": histograms_us(),
        "gateway, an item": gateway_us(),
        "gateway without histograms, an item": without_histograms_us(),
        "scrape of /metrics": best_us(lambda: [scrape() for _ in range(20)], 20),
        "frame of the live page": best_us(lambda: [feed._event() for _ in range(50)], 50),
        "frame, once a second": cold_us(feed._event),
    }
    try:
        found["gateway, tracing on, none sampled, an item"] = gateway_us(traced(0.0))
        found["gateway, tracing on, all sampled, an item"] = gateway_us(traced(1.0))
    except ModuleNotFoundError:
        click.echo("tracing is left out: pip install 'evenkeel[otel]'")
    rows: list[dict[str, Any]] = [{"what": what, "cpu_us": value} for what, value in found.items()]
    if url is not None:
        cost = page_share(url, seconds)
        rows.append({"what": "live page of the server", "cpu_us": cost["per_second"] * 1e6, "share": cost["share"]})
    columns = {"what": ("what", ""), "cpu_us": ("processor us", ".3g"), "share": ("share of the gateway", ".3%")}
    show("what watching costs", rows, columns)
    write_json(json_path, {"url": url, "seconds": seconds}, rows)


if __name__ == "__main__":
    main()
