"""How to reach a Kafka broker: options from a URI, kafka-python's settings, its errors as ours.

kafka-python's defaults lose data (automatic commits, topics made by a typing error, reading what a
transaction has not committed); the settings here are the ones that do not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from charter.bus.base import MAX_MESSAGE_BYTES
from charter.errors import BackendUnavailable, BusError, CharterError, ConfigError, Fenced
from kafka import errors as kafka_errors

# kafka-python complains of every step of its loop that takes 0.1 s, as any does on a busy machine.
logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)
# The first member of a group assigns partitions before it has read about the topic; it does so again at once.
logging.getLogger("kafka.coordinator.assignors").setLevel(logging.ERROR)

RETRY_MS = 10
"""After this long a transaction asks again that found the one before it still being closed."""
FETCH_WAIT_MS = 50
"""How long a broker that has nothing new keeps a reader waiting."""
BATCH_BYTES = 1024 * 1024
"""A batch of small messages grows up to this size."""

OVERHEAD_BYTES = BATCH_BYTES + 64 * 1024
"""What a topic's `max.message.bytes` allows beyond the largest message: a whole batch, headers included."""

METADATA_AGE_MS = 10_000
"""How soon new partitions of a topic, and brokers that came meanwhile, are known."""

PASSWORD_VARIABLE = "CHARTER_KAFKA_PASSWORD"  # noqa: S105 - the name of the variable

_COMPRESSIONS = ("none", "gzip", "lz4")
_MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN")


@dataclass(frozen=True, slots=True)
class KafkaOptions:
    """How to reach a cluster, and how to write to it."""

    bootstrap: tuple[str, ...]
    """host:port of some brokers; the others are found."""
    tls: bool = False
    ca: Path | None = None
    """PEM file of the authority that signed the brokers' certificates; None trusts the system's."""
    cert: Path | None = None
    """PEM file of this client's certificate, for mutual TLS."""
    key: Path | None = None
    """PEM file of the certificate's private key."""
    sasl: str = ""
    """SCRAM-SHA-256, SCRAM-SHA-512 or PLAIN; empty for none."""
    user: str = ""
    password: str = field(default="", repr=False)
    compression: str = "lz4"
    """none, gzip or lz4."""
    replication: int = -1
    """Replicas of new topics; -1 takes the cluster's default. From 3 on, two must be in sync for a write."""
    timeout_s: float = 30.0
    """How long an operation waits for the cluster, before `BackendUnavailable`."""
    transaction_timeout_s: float = 20.0
    """After this long the cluster aborts a dead process's transaction, which readers wait for until then."""

    def __post_init__(self) -> None:
        if not self.bootstrap:
            raise ConfigError("a Kafka bus needs a broker, for example kafka://localhost:9092")
        if self.compression not in _COMPRESSIONS:
            raise ConfigError(
                f"compression must be one of {', '.join(_COMPRESSIONS)}, not {self.compression!r}"
            )
        if (self.cert is None) != (self.key is None):
            raise ConfigError("mutual TLS needs both cert and key")
        if (self.ca or self.cert) and not self.tls:
            raise ConfigError("ca, cert and key are for TLS; add tls=true")
        if self.sasl and self.sasl not in _MECHANISMS:
            raise ConfigError(f"sasl must be one of {', '.join(_MECHANISMS)}, not {self.sasl!r}")
        if self.sasl and not (self.user and self.password):
            raise ConfigError(
                f"sasl needs a user and a password; give user=…, and the password in {PASSWORD_VARIABLE}"
            )
        if self.timeout_s <= 0 or self.transaction_timeout_s <= 0:
            raise ConfigError("timeout and transaction_timeout must be more than 0 seconds")

    @classmethod
    def from_uri(cls, uri: str) -> KafkaOptions:
        """kafka://host:port[,host:port]?tls=true&ca=…&cert=…&key=…&sasl=…&user=…&compression=…&replication=3

        The password comes from `password_file=…` or the environment, never from the URI, which gets logged.
        """
        parts = urlsplit(uri)
        if "@" in parts.netloc:
            raise ConfigError(f"bus: no user or password in the URI; use user=… and {PASSWORD_VARIABLE}")
        options: dict[str, Any] = {"bootstrap": tuple(host for host in parts.netloc.split(",") if host)}
        password_file = None
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name == "password_file":
                password_file = Path(value)
            elif name in _PARSERS:
                field, parse = _PARSERS[name]
                options[field] = _parsed(uri, name, value, parse)
            else:
                known = ", ".join(sorted([*_PARSERS, "password_file"]))
                raise ConfigError(f"bus {uri!r}: unknown option {name!r}; there are {known}")
        return cls(**options, password=_password(password_file))

    @property
    def where(self) -> str:
        """The brokers and the user, for messages."""
        return ",".join(self.bootstrap) + (f" as user {self.user!r}" if self.sasl else "")

    def common(self) -> dict[str, Any]:
        """Settings of every client."""
        protocol = ("SASL_" if self.sasl else "") + ("SSL" if self.tls else "PLAINTEXT")
        settings: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap),
            "security_protocol": protocol,
            "bootstrap_timeout_ms": int(self.timeout_s * 1000),
            "request_timeout_ms": int(self.timeout_s * 1000),
            "reconnect_backoff_max_ms": 1000,
            "metadata_max_age_ms": METADATA_AGE_MS,
        }
        if self.tls:
            settings |= {
                "ssl_cafile": _text(self.ca),
                "ssl_certfile": _text(self.cert),
                "ssl_keyfile": _text(self.key),
            }
        if self.sasl:
            settings |= {
                "sasl_mechanism": self.sasl,
                "sasl_plain_username": self.user,
                "sasl_plain_password": self.password,
            }
        return settings

    def producer(self, transactional_id: str) -> dict[str, Any]:
        """Settings of a transactional producer."""
        return {
            **self.common(),
            "metrics_enabled": False,
            "transactional_id": transactional_id,
            "transaction_timeout_ms": int(self.transaction_timeout_s * 1000),
            "max_block_ms": int(self.timeout_s * 1000),
            "delivery_timeout_ms": int(self.timeout_s * 2000),  # more than one request may take
            "compression_type": None if self.compression == "none" else self.compression,
            "retry_backoff_ms": RETRY_MS,
            "batch_size": BATCH_BYTES,
            "max_request_size": MAX_MESSAGE_BYTES + OVERHEAD_BYTES,
            "allow_auto_create_topics": False,
        }

    def consumer(self) -> dict[str, Any]:
        """Settings of a consumer, in a group or not."""
        return {
            **self.common(),
            "metrics_enabled": False,
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "isolation_level": "read_committed",
            "fetch_max_wait_ms": FETCH_WAIT_MS,
            "allow_auto_create_topics": False,
        }


def _boolean(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("true or false")
    return value == "true"


_PARSERS: dict[str, tuple[str, Any]] = {
    "tls": ("tls", _boolean),
    "ca": ("ca", Path),
    "cert": ("cert", Path),
    "key": ("key", Path),
    "sasl": ("sasl", str),
    "user": ("user", str),
    "compression": ("compression", str),
    "replication": ("replication", int),
    "timeout": ("timeout_s", float),
    "transaction_timeout": ("transaction_timeout_s", float),
}


def _parsed(uri: str, name: str, value: str, parse: Any) -> Any:
    try:
        return parse(value)
    except ValueError:
        raise ConfigError(f"bus {uri!r}: option {name!r} cannot be {value!r}") from None


def _password(file: Path | None) -> str:
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE, "")
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{file}: the password cannot be read: {error.strerror}") from error


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@contextmanager
def translated(where: str, doing: str) -> Iterator[None]:
    """kafka-python's errors as ours, saying what to do."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise translate(error, where, doing) from error


def translate(error: BaseException, where: str, doing: str) -> CharterError:
    """The error of ours that says what `error` means."""
    # A producer wraps the cause in a general error.
    cause = next((a for a in error.args if isinstance(a, kafka_errors.KafkaError)), error)
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, _FENCED):
        return Fenced(f"Kafka at {where}, {doing}: another process took this member's place ({text})")
    if isinstance(cause, _AUTHENTICATION):
        return ConfigError(
            f"Kafka at {where} refuses the user or its password ({text}); set user and password"
        )
    if isinstance(cause, kafka_errors.AuthorizationError):
        # Rights can be granted while a worker waits, so it waits.
        return BackendUnavailable(f"Kafka at {where}, {doing}: the user lacks a right ({text}); grant it")
    if isinstance(cause, _TOO_LARGE):
        return BusError(
            f"Kafka at {where}, {doing}: too large for the topic ({text}); raise max_message_bytes"
        )
    if isinstance(cause, kafka_errors.KafkaConfigurationError | kafka_errors.UnsupportedVersionError):
        return ConfigError(f"Kafka at {where}, {doing}: {text}")
    # A broker that refuses a password just hangs up, and kafka-python goes on trying.
    question = (
        "is the broker running, and is the password right?"
        if " as user " in where
        else "is the broker running?"
    )
    return BackendUnavailable(f"Kafka at {where} cannot be used now, {doing} ({text}); {question}")


_FENCED = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
)
_AUTHENTICATION = (kafka_errors.SaslAuthenticationFailedError, kafka_errors.UnsupportedSaslMechanismError)
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
