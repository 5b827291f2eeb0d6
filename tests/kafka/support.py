"""The real broker of the tests: `KAFKA_BOOTSTRAP`, or one started on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from charter.bus import open_bus
from charter.bus.broker import BrokerOptions, local_broker, missing_tools
from charter.bus.topics import load_topics

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "kafka"

IMPATIENT = {"log.retention.check.interval.ms": "500", "log.initial.task.delay.ms": "500"}
"""A broker that looks for old segments often enough for a test."""


def require_tools() -> None:
    """Skips the test where Java or Maven is missing; under CI that is a failure."""
    problem = missing_tools()
    if problem is not None and os.environ.get("CI") == "true":
        pytest.fail(f"CI runs the tests on Kafka, and {problem}")
    if problem is not None:
        pytest.skip(f"no Kafka here: {problem}")


@contextmanager
def kafka_uri(folder: Path) -> Iterator[str]:
    """The URI of a cluster with Charter's topics."""
    given = os.environ.get("KAFKA_BOOTSTRAP")
    if given:
        yield _prepared(f"kafka://{given}")
        return
    require_tools()
    with local_broker(folder / "broker", CACHE, BrokerOptions(properties=IMPATIENT)) as broker:
        yield _prepared(f"kafka://{broker.address}")


def _prepared(uri: str) -> str:
    with open_bus(uri) as bus:
        bus.apply_topics(load_topics())
    return uri
