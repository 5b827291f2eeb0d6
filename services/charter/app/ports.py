"""Ports of servers that are told to each other before they listen."""

from __future__ import annotations

import socket
from dataclasses import replace

from charter.rpc import ServerConfig


class PortReservations:
    """Free ports that are kept from others until the servers that they are for begin to listen.

    A gateway is told where the policy is before the policy has its weights. Until then a socket that is
    bound, and does not listen, keeps the port: connections are refused, and nobody else can take it.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}

    def settle(self, server: ServerConfig) -> ServerConfig:
        """`server` with a port: a free one in place of 0."""
        if server.port:
            return server
        held = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
        held.bind((server.host.strip("[]"), 0))
        port = int(held.getsockname()[1])
        self._held[port] = held
        return replace(server, port=port)

    def release(self, port: int) -> None:
        """Lets the port go, right before its server listens; nothing happens where none is held."""
        if held := self._held.pop(port, None):
            held.close()

    def close(self) -> None:
        """Lets all go; safe to repeat."""
        for port in list(self._held):
            self.release(port)
