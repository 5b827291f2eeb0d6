"""How gRPC servers listen and how clients call."""

from __future__ import annotations

from dataclasses import dataclass

from charter.errors import ConfigError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where a server listens and what it bears."""

    host: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" or "[::]" in a pod."""
    port: int = 0
    """Port to listen on; 0 takes a free one, which the running server tells."""
    metrics_port: int | None = None
    """HTTP port of `/metrics`; 0 takes a free one, None serves none (another server of the process does)."""
    max_message_bytes: int = 64 * MIB
    """Largest message in either direction. gRPC's own limit of 4 MiB is below a batch of rollouts."""
    max_concurrent_calls: int = 256
    """Calls served at once; more are refused with RESOURCE_EXHAUSTED. Health and reflection don't count."""
    max_connection_age_s: float | None = 300.0
    """Connections are closed after this, so that clients find new pods behind a headless service."""
    max_connection_age_grace_s: float = 120.0
    """Calls in flight on a connection of that age get this long to finish."""
    drain_delay_s: float = 0.0
    """From NOT_SERVING to refusing new calls; in a cluster, the time that endpoints take to notice."""
    drain_grace_s: float = 30.0
    """Calls in flight get this long to finish when the server stops."""

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(f"{name} is {port}; give a port between 0 (any free one) and 65535")
        if self.max_message_bytes < 1024:
            raise ConfigError(f"max_message_bytes is {self.max_message_bytes}; give at least 1024")
        if self.max_concurrent_calls < 1:
            raise ConfigError(f"max_concurrent_calls is {self.max_concurrent_calls}; give at least 1")


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How a client calls."""

    timeout_s: float = 600.0
    """Deadline of a call that has none of its own and is not made while serving another."""
    max_message_bytes: int = 64 * MIB
    """Largest message in either direction."""
    max_attempts: int = 4
    """Attempts of a call that ends UNAVAILABLE before anything was received; other statuses never repeat."""
    keepalive_s: float = 30.0
    """A connection without traffic is probed after this, so that a dead peer is noticed."""
    keepalive_timeout_s: float = 10.0
    """A probe without a reply for this long closes the connection."""
    max_reconnect_s: float = 2.0
    """Longest pause between attempts to reach a server that is away."""

    def __post_init__(self) -> None:
        if not 2 <= self.max_attempts <= 5:
            raise ConfigError(f"max_attempts is {self.max_attempts}; gRPC takes 2 to 5")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s is {self.timeout_s}; give seconds above 0")
