"""`--bus kafka`: a broker on loopback for as long as Charter runs, its data in the state folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from charter.telemetry.logs import get_logger

log = get_logger(__name__)

KAFKA = "kafka"
_JARS = Path(".cache/kafka")
"""Kafka's own files, fetched once; under the working folder, where `make` runs."""


@contextmanager
def bus_of(bus: str, state: Path) -> Iterator[str]:
    """The bus to use. Starts Kafka and creates its topics where that was asked for; raises `CharterError`."""
    if bus != KAFKA:
        yield bus
        return
    from charter.bus import open_bus
    from charter.bus.broker import local_broker
    from charter.bus.topics import load_topics

    log.info("starting a Kafka broker", folder=str(state / KAFKA))
    with local_broker(state / KAFKA, _JARS.absolute()) as broker:
        uri = f"kafka://{broker.address}"
        with open_bus(uri) as opened:
            opened.apply_topics(load_topics())
        yield uri
