"""Every metric of Charter, in containers that are given their Prometheus registry.

    metrics = RpcMetrics.of(registry)

`of` gives the same container for the same registry, so that several services share one process. Labels
stay bounded: methods, status codes, principles, verdicts, and the last few policy versions (`Versions`);
never a request id or a text. Names follow OpenTelemetry's semantic conventions where they fit
(`gen_ai.server.request.duration` is `gen_ai_server_request_duration_seconds` in Prometheus).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Self
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics import MetricWrapperBase

from charter.errors import ConfigError

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_LOCK = threading.Lock()
_CONTAINERS: WeakKeyDictionary[CollectorRegistry, dict[type, Any]] = WeakKeyDictionary()


class Metrics:
    """A container of metrics that belong together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        raise NotImplementedError

    @classmethod
    def of(cls, registry: CollectorRegistry) -> Self:
        """The container of this kind in `registry`, made when it is first asked for."""
        with _LOCK:
            made = _CONTAINERS.setdefault(registry, {})
            if cls not in made:
                made[cls] = cls(registry)
            container = made[cls]
            assert isinstance(container, cls)
            return container


class Versions:
    """Keeps the label `version` bounded: the metrics of all but the last `keep` versions are dropped."""

    def __init__(self, *metrics: MetricWrapperBase, keep: int = 8) -> None:
        self._metrics = metrics
        self._keep = keep
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def seen(self, version: str) -> str:
        """Notes that `version` is in use; returns it."""
        with self._lock:
            self._seen[version] = None
            self._seen.move_to_end(version)
            while len(self._seen) > self._keep:
                oldest, _ = self._seen.popitem(last=False)
                for metric in self._metrics:
                    metric.remove_by_labels({"version": oldest})
        return version


class RpcMetrics(Metrics):
    """gRPC servers: calls by method and status code."""

    def __init__(self, registry: CollectorRegistry) -> None:
        method = ["rpc_service", "rpc_method"]
        self.duration = Histogram(
            "rpc_server_call_duration_seconds",
            "How long calls took, by the gRPC status that ended them.",
            [*method, "rpc_response_status_code"],
            buckets=SECONDS,
            registry=registry,
        )
        self.active = Gauge("rpc_server_active_calls", "Calls being served.", method, registry=registry)
        self.rejected = Counter(
            "rpc_server_rejected_calls_total",
            "Calls refused because the server was at its limit of concurrent calls.",
            method,
            registry=registry,
        )
        self.serving = Gauge(
            "charter_server_serving",
            "1 while the service's health is SERVING, 0 while it drains.",
            ["rpc_service"],
            registry=registry,
        )


class ModelMetrics(Metrics):
    """Language models that are served: OpenTelemetry's `gen_ai.server.*` and token usage."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["gen_ai_operation_name", "version"]
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "How long a request to the model took.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to its first token.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time for each token after the first.",
            labels,
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "gen_ai_server_tokens_total",
            "Tokens read (input) and written (output).",
            ["gen_ai_token_type", "version"],
            registry=registry,
        )
        self.info = Gauge(
            "charter_model_info",
            "1 for the weights that are served now.",
            ["service", "version", "digest"],
            registry=registry,
        )
        self.reloads = Counter(
            "charter_model_reloads_total",
            "Reloads of weights, by outcome (done, refused).",
            ["outcome"],
            registry=registry,
        )
        self.running = Gauge("charter_engine_running", "Sequences being generated now.", registry=registry)
        self.waiting = Gauge("charter_engine_waiting", "Sequences that wait for a place.", registry=registry)
        self.versions = Versions(self.duration, self.first_token, self.per_token, self.tokens)

    def served(self, service: str, version: str, digest: str) -> None:
        """Makes this the only version that `service` serves."""
        self.info.remove_by_labels({"service": service})
        self.info.labels(service, version, digest[:16]).set(1)


class ConstitutionMetrics(Metrics):
    """The constitution in force, and attempts to load another."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.info = Gauge(
            "charter_constitution_info",
            "1 for the constitution that is in force.",
            ["service", "name", "version", "digest"],
            registry=registry,
        )
        self.reloads = Counter(
            "charter_constitution_reloads_total",
            "Reloads of the constitution, by outcome (done, refused).",
            ["service", "outcome"],
            registry=registry,
        )

    def in_force(self, service: str, name: str, version: str, digest: str) -> None:
        """Makes this the only constitution of `service`."""
        self.info.remove_by_labels({"service": service})
        self.info.labels(service, name, version, digest[:16]).set(1)


class CriticMetrics(Metrics):
    """What the critic found."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.assessments = Counter(
            "charter_critic_assessments_total",
            "Answers assessed, by principle and verdict (breaks, keeps; the line is at one half).",
            ["principle", "verdict"],
            registry=registry,
        )
        self.revisions = Counter(
            "charter_critic_revisions_total",
            "Rounds of revision, by principle and whether the answer changed.",
            ["principle", "changed"],
            registry=registry,
        )


class JudgeMetrics(Metrics):
    """What the judge preferred, and how far it can be trusted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.comparisons = Counter(
            "charter_judge_comparisons_total",
            "Pairs compared, by principle.",
            ["principle"],
            registry=registry,
        )
        self.flips = Counter(
            "charter_judge_flips_total",
            "Pairs of which the judge preferred another answer when their order was swapped.",
            ["principle"],
            registry=registry,
        )
        self.confidence = Histogram(
            "charter_judge_confidence",
            "Distance of the label from one half, before clamping.",
            buckets=(0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.49, 0.5),
            registry=registry,
        )


class MetricsServer:
    """`/metrics` over HTTP, on its own port and in its own thread. Made by `serve_metrics`."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port} ({error}); choose another metrics port, or 0 for any"
            ) from error
        self.port: int = self._server.server_port
        """The port that it listens on."""

    def close(self) -> None:
        """Stops listening; safe to repeat."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Serves the registry's metrics over HTTP; port 0 takes a free one. Raises `ConfigError`."""
    return MetricsServer(registry, host, port)
