"""Starts and stops the services of this process, in the right order.

Start: the endpoint (it says "not ready" at once), then policy, critic and judge, one after another, since
they share two cores and one import of torch. Stop: the endpoint first, so that answers under way can finish.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry

from charter.app.models import SharedModels
from charter.app.ports import PortReservations
from charter.app.settings import Deployment
from charter.errors import BackendError
from charter.lm.base import LanguageModel


class Running(Protocol):
    """A service that answers."""

    async def drain(self) -> None:
        """Finishes what it has begun, within its grace, and closes; safe to repeat."""
        ...


class Endpoint(Running, Protocol):
    """The gateway."""

    async def wait(self) -> None:
        """Returns when it has stopped."""
        ...


class Services:
    """The services of this process. Start each once, then `stop`, which may come before they are done."""

    def __init__(self, deployment: Deployment, ports: PortReservations) -> None:
        self._deployment = deployment
        self._ports = ports
        # The process's own registry has its memory, CPU and garbage collection, too.
        self._registry: CollectorRegistry = REGISTRY
        self._models = SharedModels(_open_model)
        self._gateway: Endpoint | None = None
        self._servers: list[Running] = []

    async def start_endpoint(self) -> str:
        """Starts the gateway, where one is wanted, and returns its URL. Quick; raises `CharterError`."""
        config = self._deployment.gateway
        if config is None:
            return ""
        from charter.gateway import server as gateway

        running = self._gateway = await gateway.serve(config, self._registry)
        return running.url

    async def start_models(self) -> None:
        """Starts the others; returns when all answer. Raises `CharterError`."""
        plan = self._deployment
        if plan.policy is not None:
            from charter.policy import server as policy

            opener = self._opener(plan.policy.server.port, _open_model)
            self._servers.append(await policy.serve(plan.policy, self._registry, open_model=opener))
        if plan.critic is not None:
            from charter.critic import server as critic

            opener = self._opener(plan.critic.server.port, self._models.open)
            self._servers.append(await critic.serve(plan.critic, self._registry, open_model=opener))
        if plan.judge is not None:
            from charter.judge import server as judge

            opener = self._opener(plan.judge.server.port, self._models.open)
            self._servers.append(await judge.serve(plan.judge, self._registry, open_model=opener))

    async def run_until(self, stop: asyncio.Task[None]) -> None:
        """Returns when `stop` is done; raises `BackendError` when the endpoint ends by itself before.

        gRPC servers have no way to end by themselves.
        """
        if self._gateway is None:
            await stop
            return
        ended = asyncio.create_task(self._gateway.wait())
        try:
            await asyncio.wait([stop, ended], return_when=asyncio.FIRST_COMPLETED)
            if not stop.done():
                raise BackendError("the endpoint ended by itself; the log says why; start Charter again")
        finally:
            ended.cancel()

    async def stop(self) -> None:
        """Closes all that was started; safe to repeat."""
        if self._gateway is not None:
            await self._gateway.drain()
        await asyncio.gather(*(server.drain() for server in self._servers))

    def _opener(
        self, port: int, open_model: Callable[[str], LanguageModel]
    ) -> Callable[[str], LanguageModel]:
        """Opens a model and then lets the server's port go, since the server listens right after."""

        def opened(uri: str) -> LanguageModel:
            model = open_model(uri)
            self._ports.release(port)
            return model

        return opened


def _open_model(uri: str) -> LanguageModel:
    from charter.lm import open_model

    return open_model(uri)
