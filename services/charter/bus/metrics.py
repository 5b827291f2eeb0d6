"""The metrics of everything that reads and writes the log, in one container; the registry is passed in.

Labels are topics, groups and partitions, which `topics.yaml` and the services bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from charter.bus.base import Lag, Record
from charter.telemetry.metrics import Metrics

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)
_AGES = (0.01, 0.05, 0.25, 1, 5, 20, 60, 300, 1800, 7200, 86400)


class BusMetrics(Metrics):
    """What the workers of one process count; `BusMetrics.of(registry)` makes or finds it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        group_topic = ("group", "topic")
        self.records = Counter(
            "charter_bus_records_total",
            "Records whose position was committed, by outcome: done or dead_letter.",
            (*group_topic, "outcome"),
            registry=registry,
        )
        self.published = Counter(
            "charter_bus_published_total",
            "Messages published by a group's work.",
            group_topic,
            registry=registry,
        )
        self.retries = Counter(
            "charter_bus_retries_total",
            "Failed attempts: unavailable (a dependency is down) or failed (counts towards burial).",
            (*group_topic, "kind"),
            registry=registry,
        )
        self.fenced = Counter(
            "charter_bus_fenced_total",
            "Batches thrown away for another member.",
            ("group",),
            registry=registry,
        )
        self.phase_seconds = Histogram(
            "charter_bus_phase_seconds",
            "Time of a batch by phase: poll (waiting for messages included), work, commit.",
            ("group", "phase"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.age_seconds = Histogram(
            "charter_bus_age_seconds",
            "Time from a message's publication until its position was committed.",
            group_topic,
            buckets=_AGES,
            registry=registry,
        )
        self.prompt_to_label_seconds = Histogram(
            "charter_prompt_to_label_seconds",
            "Time from a prompt's creation until its preference label.",
            buckets=_AGES,
            registry=registry,
        )
        self.lag_records = Gauge(
            "charter_bus_lag_records",
            "Records that the group has not committed yet.",
            (*group_topic, "partition"),
            registry=registry,
        )
        self.oldest_seconds = Gauge(
            "charter_bus_oldest_seconds",
            "Age of the oldest record that the group has not committed; 0 when there is none.",
            group_topic,
            registry=registry,
        )
        self.held_back = Gauge(
            "charter_bus_held_back",
            "1 while a worker waits because a topic downstream is full.",
            ("group",),
            registry=registry,
        )

    def spent(self) -> dict[str, dict[str, float]]:
        """Group, phase: seconds so far."""
        seconds: dict[str, dict[str, float]] = {}
        for metric in self.phase_seconds.collect():
            for sample in metric.samples:
                if sample.name.endswith("_sum"):
                    seconds.setdefault(sample.labels["group"], {})[sample.labels["phase"]] = sample.value
        return seconds

    def observe_lag(self, lags: Sequence[Lag]) -> None:
        """Takes what `Bus.lag` says."""
        now_ms = time.time() * 1000
        oldest: dict[tuple[str, str], float] = {}
        for lag in lags:
            self.lag_records.labels(lag.group, lag.topic, str(lag.partition)).set(lag.records)
            age = 0.0 if lag.oldest_ms is None else max(0.0, (now_ms - lag.oldest_ms) / 1000)
            place = (lag.group, lag.topic)
            oldest[place] = max(oldest.get(place, 0.0), age)
        for place, age in oldest.items():
            self.oldest_seconds.labels(*place).set(age)

    def observe_committed(self, group: str, records: Sequence[Record], outcomes: Sequence[str]) -> None:
        """Records whose positions have moved; one outcome for each."""
        now_ms = time.time() * 1000
        for record, outcome in zip(records, outcomes, strict=True):
            self.records.labels(group, record.topic, outcome).inc()
            self.age_seconds.labels(group, record.topic).observe(
                max(0.0, (now_ms - record.timestamp_ms) / 1000)
            )
