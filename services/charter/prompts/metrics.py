"""What the prompt source counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from charter.telemetry.metrics import Metrics


class PromptMetrics(Metrics):
    """`PromptMetrics.of(registry)` makes or finds it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.published = Counter(
            "charter_prompts_published_total", "Prompts published, by source.", ["source"], registry=registry
        )
        self.invented = Counter(
            "charter_prompts_invented_total", "New prompts that a model invented.", registry=registry
        )
        self.refused = Counter(
            "charter_prompts_refused_total",
            "Prompts left out: held out, near-duplicates, cut off, or without a user's turn; by source.",
            ["source"],
            registry=registry,
        )
