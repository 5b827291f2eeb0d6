"""The real broker of the tests: `KAFKA_BOOTSTRAP`, or one started on loopback."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

from charter.bus import open_bus
from charter.bus.broker import BrokerOptions, local_broker, missing_tools
from charter.bus.topics import load_topics
from charter.errors import BackendUnavailable

T = TypeVar("T")
PATIENCE_S = 120.0

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "kafka"

ON_A_BROKER = [
    pytest.mark.kafka,
    pytest.mark.timeout(600),
    # kafka-python leaves the sockets of failed connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
"""The marks of a module whose broker fails on purpose."""

QUICK = "timeout=6&transaction_timeout=8"
"""Options of a bus that gives up soon."""

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


def patiently(call: Callable[[], T]) -> T:
    """What a worker does: again and again while the log is unavailable."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except BackendUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def nothing_yet() -> NoReturn:
    """For `patiently`: what was polled for is still to come."""
    raise BackendUnavailable("nothing came yet")
