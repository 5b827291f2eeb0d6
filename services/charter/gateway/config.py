"""What a gateway can be told, with meanings, units and defaults."""

from __future__ import annotations

import functools
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from charter.errors import ConfigError
from charter.gateway.guard import GuardMode, GuardRules


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """A gateway's configuration; raises `ConfigError` for a combination that cannot work."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but loopback needs keys."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    policy: str = "grpc://127.0.0.1:7001"
    """URI of the model that answers (`charter.lm.open_model`)."""
    model: str = "charter"
    """The name by which clients ask for it."""
    critic: str = ""
    """host:port of the critic; empty: none, and only guard mode off."""
    constitution: str = "seed"
    """The constitution that the critic reads, a path or a bare name: it has priorities and categories."""
    guard: GuardMode = GuardMode.GATED
    """Mode where neither key nor request says otherwise."""
    weakest_guard: GuardMode = GuardMode.OFF
    """Weakest mode that a request without key may ask for."""
    rules: GuardRules = field(default_factory=GuardRules)
    fail_open: bool = False
    """What happens to a guarded answer while the critic is away: withheld with 503, or given unassessed."""
    keys: Path | None = None
    """File of API keys (`charter keys add`); while it has none, everybody on loopback may ask."""
    requests_per_minute: int = 0
    """For each key that has no limit of its own, and for requests without key; 0: unlimited."""
    tokens_per_minute: int = 0
    """As `requests_per_minute`, for tokens read and written."""
    max_running: int = 128
    """Requests worked on at once."""
    max_waiting: int = 256
    """Requests that may wait for a place; more are turned away with 503."""
    queue_seconds: float = 30.0
    """How long a request waits for a place before it is turned away."""
    request_seconds: float = 300.0
    """How long a request may take in all."""
    heartbeat_seconds: float = 5.0
    """A stream that has nothing to send yet sends a comment this often."""
    max_body_bytes: int = 1 << 20
    """Largest request body."""
    default_max_tokens: int = 512
    """Length of an answer where the request says nothing."""
    default_temperature: float = 0.7
    """Temperature where the request says nothing."""
    max_n: int = 8
    """Most answers to one request."""
    bus: str = ""
    """Where conversations go that their users gave for training (`charter.bus.open_bus`); empty: nowhere."""
    max_contributions: int = 1024
    """Conversations that may wait to be written to the bus; more are not recorded, and the answer says so."""
    drain_seconds: float = 30.0
    """How long requests in flight may go on after a stop."""

    def __post_init__(self) -> None:
        if self.guard.strictness < self.weakest_guard.strictness:
            raise ConfigError(
                f"guard mode {self.guard} is weaker than the weakest allowed, {self.weakest_guard}; "
                "choose a stricter default or allow a weaker mode"
            )
        if self.guard is not GuardMode.OFF and not self.critic:
            raise ConfigError(
                f"guard mode {self.guard} needs a critic; name its host:port, or choose guard mode off"
            )
        positive = (
            "max_running",
            "request_seconds",
            "heartbeat_seconds",
            "max_body_bytes",
            "default_max_tokens",
            "max_n",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; choose a number above 0")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether `host` names this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
