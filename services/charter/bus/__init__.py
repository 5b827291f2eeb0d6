"""A partitioned, durable log with consumer groups: an embedded one in SQLite, or Kafka.

with open_bus("sqlite:.charter/bus.db") as bus:
    bus.publish([messages.encode("prompts", event.prompt_id, event)])
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from charter.bus.base import (
    Bounds,
    Bus,
    Cleanup,
    Consumer,
    ConsumerOptions,
    DeadLetter,
    Delivery,
    Lag,
    Outgoing,
    Partition,
    Position,
    Record,
    TopicChange,
    TopicSpec,
    is_for,
)
from charter.errors import ConfigError

__all__ = [
    "Bounds",
    "Bus",
    "Cleanup",
    "Consumer",
    "ConsumerOptions",
    "DeadLetter",
    "Delivery",
    "Lag",
    "Outgoing",
    "Partition",
    "Position",
    "Record",
    "TopicChange",
    "TopicSpec",
    "is_for",
    "open_bus",
]


def open_bus(uri: str) -> Bus:
    """Opens the log that a URI names.

    sqlite:<file>[?synchronous=full|normal&lock_timeout=30]   (see `charter.bus.sqlite`)
    kafka://host:port[,host:port][?…]                         (see `charter.bus.kafka`)
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "sqlite":
        return _open_sqlite(uri, rest)
    if scheme == "kafka":
        return _open_kafka(uri)
    raise ConfigError(f"bus {uri!r}: unknown kind {scheme!r}; use sqlite:<file> or kafka://host:port")


def _open_kafka(uri: str) -> Bus:
    try:
        from charter.bus._kafka_client import KafkaOptions
        from charter.bus.kafka import KafkaBus
    except ModuleNotFoundError as error:
        raise ConfigError(f"bus {uri!r}: {error.name!r} is not installed; install charter[kafka]") from error
    return KafkaBus(KafkaOptions.from_uri(uri))


def _open_sqlite(uri: str, rest: str) -> Bus:
    from charter.bus.sqlite import SqliteBus, SqliteOptions

    path, _, query = rest.partition("?")
    if not path:
        raise ConfigError(f"bus {uri!r}: name a file, for example sqlite:.charter/bus.db")
    options: dict[str, object] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "synchronous":
            options["synchronous"] = value
        elif name == "lock_timeout":
            options["lock_timeout_s"] = _seconds(uri, name, value)
        else:
            raise ConfigError(f"bus {uri!r}: unknown option {name!r}; there are synchronous and lock_timeout")
    return SqliteBus(Path(urlsplit(path).path), SqliteOptions(**options))  # type: ignore[arg-type]


def _seconds(uri: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(
            f"bus {uri!r}: option {name!r} must be a number of seconds, not {value!r}"
        ) from None
