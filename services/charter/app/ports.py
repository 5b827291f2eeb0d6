"""Listening sockets, bound before anything slow begins, so that a taken port is said at once."""

from __future__ import annotations

import errno
import ipaddress
import socket

from charter.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises `ConfigError` with what to do."""
    bare = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"the host '{host}' is not an address of this machine ({error.strerror})"
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise ConfigError(_refusal(host, port, error)) from error
    bound.setblocking(False)
    return bound


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is already taken, perhaps by another Charter; stop what has it, or take "
            "another with --port (make run PORT=...)"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs rights that this user has not; take one above 1023 (make run PORT=...)"
    return f"cannot listen on {host}:{port} ({error.strerror}); give an address of this machine with --host"


def url(host: str, port: int) -> str:
    """How a browser on this machine writes the address."""
    bare = host.strip("[]")
    if bare in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        bare = "127.0.0.1"
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"
