"""A gateway's life: everything it needs is opened, the port is bound, and a stop lets answers finish.

    gateway = await serve(config, registry)
    ...
    await gateway.drain()

Or, for a process of its own, `run(config)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack

import uvicorn
from prometheus_client import CollectorRegistry

from charter.errors import ConfigError
from charter.gateway.admission import Doorkeeper
from charter.gateway.app import Gateway, build_app
from charter.gateway.config import GatewayConfig
from charter.gateway.contributions import Contributions
from charter.gateway.gate import Gate
from charter.gateway.keys import KeyFile
from charter.gateway.metrics import GatewayMetrics
from charter.gateway.principles import Principles
from charter.gateway.service import ChatService
from charter.gateway.upstream import SingleUpstream, Upstreams
from charter.lm.base import LanguageModel
from charter.rpc.clients import CriticClient
from charter.telemetry.logs import get_logger
from charter.telemetry.metrics import ConstitutionMetrics

log = get_logger(__name__)

_CONTRIBUTIONS_SECONDS = 10.0
"""How long a stop waits for conversations to be written."""


class RunningGateway:
    """A gateway that answers. Made by `serve`; stopped by `drain`, or by leaving `async with`."""

    def __init__(
        self, server: uvicorn.Server, sock: socket.socket, gateway: Gateway, owned: AsyncExitStack
    ) -> None:
        self._server = server
        self._gateway = gateway
        self._owned = owned
        self._serving = asyncio.get_running_loop().create_task(server.serve(sockets=[sock]))
        self._drained: asyncio.Task[None] | None = None
        self.port: int = sock.getsockname()[1]
        """The port that it listens on."""

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it, as `base_url` of the openai client."""
        host = self._gateway.config.host
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)  # noqa: S104
        return f"http://{reachable}:{self.port}/v1"

    async def drain(self) -> None:
        """`/readyz` says no, requests in flight finish within the grace, all is closed; safe to repeat."""
        if self._drained is None:
            self._drained = asyncio.get_running_loop().create_task(self._drain())
        await asyncio.shield(self._drained)

    async def wait(self) -> None:
        """Returns when the gateway has stopped."""
        await asyncio.shield(self._serving)
        await self.drain()

    async def __aenter__(self) -> RunningGateway:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()

    async def started(self) -> None:
        """Returns when connections are taken; raises what kept the server from it."""
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise ConfigError("the HTTP server stopped while it started; its log says why")
            await asyncio.sleep(0.005)

    async def _drain(self) -> None:
        self._gateway.draining = True
        self._server.should_exit = True
        await asyncio.wait({self._serving})
        await self._owned.aclose()
        log.info("gateway stopped", port=self.port)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: whoever started the gateway decides when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    config: GatewayConfig,
    registry: CollectorRegistry,
    listener: socket.socket | None = None,
    *,
    upstreams: Upstreams | None = None,
) -> RunningGateway:
    """Starts a gateway in the running event loop; its metrics go to `registry`.

    It listens on `listener` (bound already; the gateway closes it) or binds the configured address, and
    answers with `upstreams` or the configured policy.

    Raises `ConfigError` for a port that is taken, an unreadable constitution or key file, or an address that
    other machines can reach without keys. Policy and critic need not be up yet.
    """
    doorkeeper = Doorkeeper(config, KeyFile(config.keys) if config.keys else None)
    async with AsyncExitStack() as stack:
        sock = listener or _bind(config.host, config.port)
        stack.callback(sock.close)
        upstreams = upstreams or SingleUpstream(_open_model(config.policy))
        stack.push_async_callback(upstreams.close)
        service = ChatService(
            config,
            upstreams,
            await _open_gate(config, registry, stack),
            await _open_contributions(config, registry, stack),
            GatewayMetrics.of(registry),
        )
        gateway = Gateway(config, service, doorkeeper, registry)
        running = RunningGateway(_server(gateway), sock, gateway, stack.pop_all())
    try:
        await running.started()
    except BaseException:
        await running.drain()
        raise
    log.info("gateway started", url=running.url, guard=config.guard.value, policy=config.policy)
    return running


async def run(config: GatewayConfig, registry: CollectorRegistry) -> None:
    """Serves until SIGTERM or SIGINT, then drains. For a process of its own."""
    running = await serve(config, registry)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await running.drain()


def _open_model(uri: str) -> LanguageModel:
    from charter.lm import open_model

    return open_model(uri)


async def _open_gate(
    config: GatewayConfig, registry: CollectorRegistry, stack: AsyncExitStack
) -> Gate | None:
    if not config.critic:
        return None
    principles = Principles(config.constitution, ConstitutionMetrics.of(registry))
    watching = asyncio.get_running_loop().create_task(principles.watch())
    stack.callback(watching.cancel)
    critic = CriticClient(config.critic)
    stack.push_async_callback(critic.close)
    return Gate(critic, principles, config.rules)


async def _open_contributions(
    config: GatewayConfig, registry: CollectorRegistry, stack: AsyncExitStack
) -> Contributions | None:
    if not config.bus:
        return None
    from charter.bus import open_bus
    from charter.privacy import redact

    bus = await asyncio.to_thread(open_bus, config.bus)
    stack.callback(bus.close)
    contributions = Contributions(bus, redact, GatewayMetrics.of(registry), config.max_contributions)
    stack.push_async_callback(contributions.stop, _CONTRIBUTIONS_SECONDS)
    return contributions


def _server(gateway: Gateway) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            build_app(gateway),
            log_config=None,
            access_log=False,  # the gateway writes one structured line for each request itself
            server_header=False,
            proxy_headers=False,  # nothing here depends on the caller's address
            lifespan="off",
            timeout_keep_alive=75,  # longer than load balancers keep idle connections
            timeout_graceful_shutdown=int(gateway.config.drain_seconds) or 1,
        )
    )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another port, or stop the "
            "process that has it"
        ) from error
    sock.setblocking(False)
    return sock
