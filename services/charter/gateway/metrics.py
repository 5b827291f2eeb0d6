"""The gateway's metrics; labels are bounded: outcomes, modes, stages, verdicts, principles."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from charter.telemetry.metrics import SECONDS, Metrics


class GatewayMetrics(Metrics):
    """Requests, their stages, and what the guard decided."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "charter_gateway_requests_total",
            "Requests, by guard mode, by whether they stream, and by outcome (ok, cancelled, or the error's "
            "code); mode and stream are - where a request was refused before they were known.",
            ["guard", "stream", "outcome"],
            registry=registry,
        )
        self.stage = Histogram(
            "charter_gateway_stage_seconds",
            "Time of each stage of a request: queue, first (until an answer's first byte leaves), draft, "
            "assess, revise, total.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.verdicts = Counter(
            "charter_gateway_verdicts_total",
            "Answers, by verdict and by the worst principle involved (none where there is none).",
            ["verdict", "principle"],
            registry=registry,
        )
        self.rounds = Histogram(
            "charter_gateway_rounds",
            "Rounds of critique and revision of an answer that was held back.",
            buckets=(0, 1, 2, 3, 4, 6, 8),
            registry=registry,
        )
        self.tokens = Counter(
            "charter_gateway_tokens_total",
            "Tokens of requests, read (input) and written (output) by the policy.",
            ["gen_ai_token_type"],
            registry=registry,
        )
        self.running = Gauge("charter_gateway_running", "Requests being worked on.", registry=registry)
        self.waiting = Gauge("charter_gateway_waiting", "Requests waiting for a place.", registry=registry)
        self.contributions = Counter(
            "charter_gateway_contributions_total",
            "Conversations given for training, by outcome (written, full, failed).",
            ["outcome"],
            registry=registry,
        )
