"""Servers: health, reflection, limits, metrics and graceful drain around any set of services."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from charter.errors import ConfigError
from charter.rpc.config import ServerConfig
from charter.rpc.interceptor import CallInterceptor
from charter.telemetry.logs import get_logger
from charter.telemetry.metrics import MetricsServer, RpcMetrics, serve_metrics

log = get_logger(__name__)

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - looked up, not bound


@dataclass(frozen=True, slots=True)
class Service:
    """A service to be served."""

    name: str
    """Full name: `policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name`."""
    add: Callable[[Any, Any], None]
    """The generated `add_…Servicer_to_server`."""
    servicer: Any
    """Implements the service's methods."""
    close: Callable[[], Awaitable[None]] | None = None
    """Releases what the service holds, after the last call has finished."""


def _options(config: ServerConfig) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a share of the traffic
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ("grpc.max_connection_age_grace_ms", int(config.max_connection_age_grace_s * 1000)),
    ]
    if config.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)))
    return options


class RunningServer:
    """A server that answers. Made by `serve`; stopped by `drain`, or by leaving `async with`."""

    def __init__(
        self,
        inner: grpc.aio.Server,
        services: Sequence[Service],
        config: ServerConfig,
        registry: CollectorRegistry,
        port: int,
    ) -> None:
        self._inner = inner
        self._services = tuple(services)
        self._config = config
        self._metrics = RpcMetrics.of(registry)
        self._health = health.aio.HealthServicer()
        self._http: MetricsServer | None = None
        self._drained: asyncio.Task[None] | None = None
        self.port = port
        """The port that it listens on."""

    @property
    def target(self) -> str:
        """`host:port` for a client on this machine."""
        host = self._config.host
        return f"{_LOOPBACK.get(host, host)}:{self.port}"

    @property
    def metrics_port(self) -> int | None:
        """The HTTP port of `/metrics`, if it has one."""
        return self._http.port if self._http else None

    async def set_serving(self, serving: bool) -> None:
        """Tells health checks whether calls are welcome. After `drain` began it stays NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *(s.name for s in self._services)):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
        if self._drained is None:
            self._show_serving(serving)

    async def drain(self) -> None:
        """Health goes NOT_SERVING, calls in flight finish within the grace, all is closed; safe to repeat.

        Cancelling whoever waits does not stop the drain.
        """
        if self._drained is None:
            self._drained = asyncio.get_running_loop().create_task(self._drain())
        await asyncio.shield(self._drained)

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await self._inner.wait_for_termination()
        if self._drained is not None:
            await asyncio.shield(self._drained)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()

    async def start(self, registry: CollectorRegistry) -> None:
        """Called once, by `serve`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._inner)
        names = [s.name for s in self._services]
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._inner
        )
        if self._config.metrics_port is not None:
            self._http = serve_metrics(registry, self._config.host.strip("[]"), self._config.metrics_port)
        await self._inner.start()
        await self.set_serving(True)
        log.info("server started", services=names, address=self.target, metrics_port=self.metrics_port)

    async def _drain(self) -> None:
        log.info("server drains", address=self.target, grace_s=self._config.drain_grace_s)
        await self._health.enter_graceful_shutdown()
        self._show_serving(False)
        await asyncio.sleep(self._config.drain_delay_s)
        await self._inner.stop(self._config.drain_grace_s)
        for service in self._services:
            if service.close is not None:
                await service.close()
        if self._http is not None:
            await asyncio.to_thread(self._http.close)
        log.info("server stopped", address=self.target)

    def _show_serving(self, serving: bool) -> None:
        for service in self._services:
            self._metrics.serving.labels(service.name).set(int(serving))


async def serve(
    services: Sequence[Service], config: ServerConfig, registry: CollectorRegistry
) -> RunningServer:
    """Starts a server for `services` in the running event loop; their metrics go to `registry`.

    Raises `ConfigError` when a port is taken or the address does not exist.
    """
    interceptor = CallInterceptor(RpcMetrics.of(registry), config.max_concurrent_calls)
    inner = grpc.aio.server(interceptors=[interceptor], options=_options(config))
    for service in services:
        service.add(service.servicer, inner)
    try:
        port = inner.add_insecure_port(f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: the port is taken, or the address is not one of "
            "this machine; choose another port (0 takes any free one), or stop the process that has it"
        ) from error
    running = RunningServer(inner, services, config, registry, port)
    try:
        await running.start(registry)
    except BaseException:
        await inner.stop(None)
        raise
    return running
