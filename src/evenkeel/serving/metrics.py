"""Exposes the gateway's counts to Prometheus, read at scrape time, so that requests pay nothing."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from evenkeel.serving.gateway.gateway import Gateway

__all__ = ["Metrics"]

_PREFIX = "evenkeel_"


class Metrics:
    """Writes the body of `/metrics` for one gateway.

    Args:
        gateway: whose counts are shown.
        lossy: what each end of a link that loses packets counts, by its name.
    """

    def __init__(self, gateway: Gateway, lossy: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_GatewayCollector(gateway, lossy or {}))

    def __call__(self) -> bytes:
        """Writes the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _GatewayCollector(Collector):
    def __init__(self, gateway: Gateway, lossy: Mapping[str, Mapping[str, int]]) -> None:
        self._gateway = gateway
        self._lossy = lossy

    def collect(self) -> Iterator[Metric]:
        stats, promises = self._gateway.stats, self._gateway.promises
        for name, value, text in (
            ("items", stats.items, "Items taken in."),
            ("shed", stats.shed, "Items refused: queues full, or no replica ready."),
            ("failed", stats.failed, "Items that ended in an error."),
            ("abandoned", stats.abandoned, "Items given up because their client went away."),
            ("deadlines", stats.deadlines, "Items that reached their deadline."),
            ("hedges", stats.hedges, "Second attempts by policy."),
            ("hedges_won", stats.hedges_won, "Hedges that answered."),
            ("hedge_budget_exhausted", stats.budget_exhausted, "Hedges that were due but over budget."),
            ("cancels", stats.cancels, "Attempts cancelled because another answered."),
            ("lost_attempts", stats.lost_attempts, "Replica tasks that ended in an error."),
            ("retries", stats.retries, "Attempts that replaced lost or stalled ones."),
            ("lost_backup_passes", stats.lost_passes, "Backup tasks that ended in an error."),
            ("unsure_fills", stats.unsure_fills, "Fills not used because of low confidence."),
            ("fills_over_budget", stats.fills_over_budget, "Fills that waited because of max_approximate."),
            ("fills_compared", stats.fills_compared, "Approximate fills whose exact reply came later."),
            ("fills_agreed", stats.fills_agreed, "Those of them with the same label."),
            (
                "escalated",
                stats.escalated,
                "Items that the light model of a cascade was not sure of, or not asked about.",
            ),
            ("audits", stats.audits, "Items that both models of a cascade answered, chosen at random."),
            ("audits_agreed", stats.audits_agreed, "Those of them in which both say the same."),
            (
                "promise_alarms",
                0 if promises is None else promises.alarms,
                "Thresholds that audits showed to be wrong.",
            ),
            (
                "degraded_within_promise",
                0 if promises is None else promises.degraded,
                "Degraded answers that their promise leaves room for.",
            ),
            ("bad_replies", stats.bad_replies, "Replies of a wrong shape, or not finite."),
            ("readmissions", stats.readmissions, "Replicas taken back after good probes."),
            ("probes", stats.probes, "Copies of items sent to ejected replicas."),
            ("extra_passes", stats.extra_passes, "Work beyond one pass an item, in replica passes."),
        ):
            metric = CounterMetricFamily(_PREFIX + name, text)
            metric.add_metric([], value)
            yield metric
        for name, label, values, text in (
            ("answers", "source", stats.sources, "Answers by how they are known."),
            ("fills", "code", stats.fills, "Answers taken from a spare."),
            ("backup_passes", "code", stats.passes, "Groups sent to backups."),
            ("backup_items", "code", stats.grouped, "Items in those groups."),
            ("ejections", "reason", stats.ejections, "Replicas taken out."),
        ):
            metric = CounterMetricFamily(_PREFIX + name, text, labels=[label])
            for key, value in sorted(values.items()):
                metric.add_metric([key], value)
            yield metric
        if promises is not None:
            text = "Promises that cannot be shown now: too many answers were degraded or missing."
            yield GaugeMetricFamily(_PREFIX + "promises_unshown", text, promises.unshown)
        if self._lossy:
            metric = CounterMetricFamily(
                _PREFIX + "lossy", "Packets and images on links that lose packets.", labels=["end", "what"]
            )
            for end, counts in self._lossy.items():
                for what, value in sorted(counts.items()):
                    metric.add_metric([end, what], value)
            yield metric
        yield GaugeMetricFamily(_PREFIX + "in_flight", "Items without an answer yet.", self._gateway.in_flight)
        up = GaugeMetricFamily(
            _PREFIX + "backend_up", "1 when a replica is there and was not ejected.", labels=["backend"]
        )
        outstanding = GaugeMetricFamily(_PREFIX + "backend_outstanding", "Tasks at a replica.", labels=["backend"])
        for replica in self._gateway.replicas.all:
            # One that is still untried is there; whether the fleet as a whole is well, readiness says.
            usable = replica.backend.ready and replica.health.ejected_for in (None, "untried")
            up.add_metric([replica.backend.name], float(usable))
            outstanding.add_metric([replica.backend.name], replica.outstanding)
        yield up
        yield outstanding
        quantiles = GaugeMetricFamily(
            _PREFIX + "service_seconds", "Live quantiles of the replicas' service time.", labels=["quantile"]
        )
        for q in (0.5, 0.9, 0.95, 0.99):
            seconds = self._gateway.service_times.quantile(q)
            if seconds is not None:
                quantiles.add_metric([f"{q:g}"], seconds)
        yield quantiles
