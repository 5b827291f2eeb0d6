import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from charter.errors import ConfigError
from charter.telemetry import serve_metrics
from charter.telemetry.metrics import ConstitutionMetrics, ModelMetrics, RpcMetrics


def test_services_of_one_process_share_their_metrics():
    registry = CollectorRegistry()
    assert RpcMetrics.of(registry) is RpcMetrics.of(registry)
    assert RpcMetrics.of(registry) is not RpcMetrics.of(CollectorRegistry())


def test_only_the_last_policy_versions_keep_their_series():
    registry = CollectorRegistry()
    metrics = ModelMetrics.of(registry)
    for i in range(20):
        metrics.tokens.labels("output", metrics.versions.seen(f"step-{i}")).inc()
    text = generate_latest(registry).decode()
    assert 'version="step-19"' in text
    assert 'version="step-12"' in text
    assert 'version="step-11"' not in text


def test_one_constitution_is_in_force_at_a_time():
    registry = CollectorRegistry()
    metrics = ConstitutionMetrics.of(registry)
    metrics.in_force("critic", "seed", "1", "a" * 64)
    metrics.in_force("judge", "seed", "1", "a" * 64)
    metrics.in_force("critic", "seed", "2", "b" * 64)
    shown = [
        line for line in generate_latest(registry).decode().splitlines() if line.startswith("charter_const")
    ]
    assert sorted(shown) == [
        'charter_constitution_info{digest="aaaaaaaaaaaaaaaa",name="seed",service="judge",version="1"} 1.0',
        'charter_constitution_info{digest="bbbbbbbbbbbbbbbb",name="seed",service="critic",version="2"} 1.0',
    ]


def test_metrics_are_served_over_http_until_closed():
    registry = CollectorRegistry()
    RpcMetrics.of(registry).serving.labels("charter.v1.Test").set(1)
    server = serve_metrics(registry)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as response:
        assert b'charter_server_serving{rpc_service="charter.v1.Test"} 1.0' in response.read()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()


def test_a_taken_metrics_port_is_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another metrics port"):
            serve_metrics(CollectorRegistry(), port=taken.getsockname()[1])
