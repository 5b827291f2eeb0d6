"""What the publisher counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from charter.telemetry.metrics import Metrics


class PublisherMetrics(Metrics):
    """`PublisherMetrics.of(registry)` makes or finds it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.decisions = Counter(
            "charter_publisher_decisions_total",
            "Candidates decided on: promoted, rejected or superseded.",
            ["decision"],
            registry=registry,
        )
        self.measured = Gauge(
            "charter_publisher_measured",
            "What the gate measured last, by criterion, of the candidate and of the serving model.",
            ["criterion", "model"],
            registry=registry,
        )
        self.seconds = Histogram(
            "charter_publisher_gate_seconds",
            "How long measuring a candidate took.",
            buckets=(1, 3, 10, 30, 60, 120, 300, 900, 3600),
            registry=registry,
        )
        self.told = Counter(
            "charter_publisher_converged_total",
            "Policy servers that served something else than what is in force and were told.",
            registry=registry,
        )
