"""How services speak gRPC: one scaffolding for servers, one for clients.

A server:

    service = rpc.Service(name, add_CriticServiceServicer_to_server, servicer)
    server = await rpc.serve([service], config, registry)
    await server.wait()

A client:

    async with rpc.channel("critic:50052") as channel:
        stub = CriticServiceStub(channel)
        response = await stub.Assess(request)

Both ends carry the request id (`x-request-id`) and the deadline: a call made while serving another gets
what is left of its time. A server turns our errors into gRPC statuses; a client raises the same class with
the same sentence.
"""

from __future__ import annotations

from charter.rpc import _environment  # noqa: F401 - before anything imports grpc
from charter.rpc.client import Channel, channel
from charter.rpc.config import ClientConfig, ServerConfig
from charter.rpc.context import remaining_seconds, time_limit
from charter.rpc.errors import error_of, status_of
from charter.rpc.server import RunningServer, Service, serve

__all__ = [
    "Channel",
    "ClientConfig",
    "RunningServer",
    "ServerConfig",
    "Service",
    "channel",
    "error_of",
    "remaining_seconds",
    "serve",
    "status_of",
    "time_limit",
]
