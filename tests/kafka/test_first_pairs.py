"""The first pairs on a broker, where the marker of each transaction takes an offset of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.circle.labels import label
from tests.kafka.support import kafka_uri

from charter.bus import Bus, Outgoing, open_bus
from charter.bus.base import REPLAY_GROUP_HEADER
from charter.bus.kafka import KafkaBus
from charter.circle import first_pairs
from charter.sampler.config import SamplerConfig
from charter.sampler.pacing import Pacer
from charter.trainer.labels import Limits, take

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    folder: Path = tmp_path_factory.mktemp("first-pairs")
    with kafka_uri(folder) as uri, open_bus(uri) as bus:
        if any(bounds.end for bounds in bus.bounds("preferences").values()):
            pytest.skip("these tests count, and this broker's topic is in use")
        yield bus


def first_pair(number: int) -> Outgoing:
    return label(number, **{REPLAY_GROUP_HEADER: b"reward"})


def publish_and_abort(bus: KafkaBus, message: Outgoing) -> None:
    """What a process leaves behind that was killed while it published."""
    producer = bus._publisher.reopen()
    producer.begin_transaction()
    for partition in range(8):
        headers = list(message.headers.items())
        producer.send(message.topic, message.value, message.key, headers, partition=partition)
    producer.flush()
    producer.abort_transaction()


def test_first_pairs_are_counted_passed_over_and_hold_nobody_back(bus: Bus) -> None:
    assert isinstance(bus, KafkaBus)
    assert first_pairs._published(bus) == 0
    bus.publish([first_pair(number) for number in range(40)])
    for number in range(40, 50):
        bus.publish([first_pair(number)])
    publish_and_abort(bus, first_pair(1000))
    bus.publish([first_pair(50)])
    publish_and_abort(bus, first_pair(1001))
    assert first_pairs._published(bus) == 51
    assert sum(bounds.end for bounds in bus.bounds("preferences").values()) > 51 + 2 * 8

    pacer = Pacer(bus, SamplerConfig(batch_size=8, max_staleness=1), 8)
    assert not pacer.has_room()
    first_pairs.pass_over(bus, "trainer-0")
    assert pacer.under_way() == 0
    first_pairs.pass_over(bus, "trainer-0")  # a later start changes nothing
    bus.publish([label(number) for number in range(100, 108)])
    assert pacer.under_way() == 8
    taken = take(bus, {}, 8, Limits(vocabulary=10, context=10))
    assert taken is not None
    assert {found.event.preference_id for found in taken.labels} == {f"label-{i}" for i in range(100, 108)}
