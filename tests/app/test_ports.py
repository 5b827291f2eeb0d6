"""Ports that are promised before anybody listens on them."""

from __future__ import annotations

import socket

import pytest

from charter.app.ports import PortReservations
from charter.rpc import ServerConfig


def test_a_reserved_port_is_nobody_elses_until_it_is_released() -> None:
    reservations = PortReservations()
    server = reservations.settle(ServerConfig(port=0))
    address = (server.host, server.port)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(address)
    reservations.release(server.port)
    with socket.socket() as mine:
        mine.bind(address)


def test_a_configured_port_is_left_as_it_is() -> None:
    reservations = PortReservations()
    server = ServerConfig(port=7001)
    assert reservations.settle(server) == server
    reservations.release(7001)
    reservations.close()
