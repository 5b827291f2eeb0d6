"""A broker that is away, dies or comes back: sentences, and recovery in place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka.future import Future
from tests.kafka.arena import Cluster
from tests.kafka.proxy import Weather
from tests.kafka.support import CACHE, ON_A_BROKER, QUICK, nothing_yet, patiently, require_tools

from charter.bus import Bus, Consumer, ConsumerOptions, Outgoing, Record, TopicSpec, open_bus
from charter.bus.base import Partition
from charter.bus.broker import Broker, fetch_kafka, free_port
from charter.bus.kafka import KafkaBus
from charter.bus.topics import load_topics
from charter.errors import BackendUnavailable, Fenced

pytestmark = ON_A_BROKER


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of these tests' own: they kill it."""
    require_tools()
    broker = Broker(tmp_path_factory.mktemp("broker"), fetch_kafka(CACHE))
    try:
        broker.start()
        yield broker
    finally:
        broker.kill()


@pytest.fixture
def bus(broker: Broker) -> Iterator[Bus]:
    with open_bus(f"kafka://{broker.address}?{QUICK}") as bus:
        bus.apply_topics([*load_topics(), TopicSpec("in", 1), TopicSpec("out", 1)])
        yield bus


def values(bus: Bus, topic: str, start: int) -> list[bytes | None]:
    """What lies behind `start`: a transaction is seen a moment after its commit."""
    return [record.value for record in bus.fetch(topic, 0, start, 1000, timeout=30.0)]


def end(bus: Bus, topic: str) -> int:
    return bus.bounds(topic)[0].end


def take(consumer: Consumer) -> list[Record]:
    return patiently(lambda: consumer.poll(10, 1.0) or nothing_yet())


def test_a_broker_that_is_not_there_is_named(broker: Broker) -> None:
    port = free_port()
    with open_bus(f"kafka://127.0.0.1:{port}?timeout=2") as bus, pytest.raises(BackendUnavailable) as caught:
        bus.publish([Outgoing("in", b"k", b"v")])
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "is the broker running?" in str(caught.value)


def test_a_commit_that_the_broker_did_not_live_to_see_happens_once(broker: Broker, bus: Bus) -> None:
    start = end(bus, "out")
    bus.publish([Outgoing("in", b"k", b"1")])
    with bus.consumer("survivors", ["in"], options=ConsumerOptions(session_timeout_s=30.0)) as consumer:
        records = take(consumer)
        broker.kill()
        with pytest.raises(BackendUnavailable):
            consumer.commit(records, publish=[Outgoing("out", b"k", b"once")])
        broker.start()
        patiently(lambda: consumer.commit(records, publish=[Outgoing("out", b"k", b"once")]))
        bus_values = patiently(lambda: values(bus, "out", start))
        assert bus_values == [b"once"]
        patiently(lambda: bus.publish([Outgoing("in", b"k", b"2")]))
        assert [record.value for record in take(consumer)] == [b"2"]


def test_positions_that_the_group_refused_do_not_come_along_with_later_ones(bus: Bus) -> None:
    """A worker that was stopped for long commits in vain, joins again and goes on."""
    assert isinstance(bus, KafkaBus)
    bus.publish([Outgoing("in", b"k", b"1")])
    specs = bus.topics()
    with bus.consumer("refused", ["in"], member="stopped") as consumer:
        take(consumer)
        now = consumer._client.group_metadata()
        before = now._replace(generation_id=now.generation_id - 1)
        producer = consumer._producer
        with pytest.raises(Fenced):
            producer.transact([], specs, {Partition("in", 0): 1}, before)
        producer.transact([], specs, {Partition("out", 0): 7}, now)
        assert bus.positions("refused") == {Partition("out", 0): 7}


def test_a_group_whose_coordinator_has_moved_is_found_again(broker: Broker, bus: Bus) -> None:
    from kafka.protocol.metadata import CoordinatorType

    assert isinstance(bus, KafkaBus)
    bus.publish([Outgoing("in", b"k", b"1")])
    with bus.consumer("moved", ["in"]) as consumer:
        consumer.commit(take(consumer))
    before = bus.positions("moved")
    known = bus._clients.admin._manager.cluster._coordinators
    assert known[CoordinatorType.GROUP, "moved"] == broker.node
    known[CoordinatorType.GROUP, "moved"] = broker.node + 6  # one that is gone
    assert patiently(lambda: bus.positions("moved")) == before


def test_a_broker_that_was_late_when_all_restarted_is_found(bus: Bus) -> None:
    assert isinstance(bus, KafkaBus)
    bus.publish([Outgoing("in", b"k", b"1")])
    before = bus.bounds("in")
    # What the client knows after a restart of all brokers in which the partition's leader came last.
    bus._clients.admin._manager.cluster._brokers.clear()
    with pytest.raises(BackendUnavailable):
        bus.bounds("in")
    assert bus.bounds("in") == before


def test_a_call_that_never_ends_is_given_up_and_the_next_one_works(bus: Bus) -> None:
    assert isinstance(bus, KafkaBus)
    bus.publish([Outgoing("in", b"k", b"1")])
    before = bus.bounds("in")
    admin = bus._clients.admin

    async def forever(*_: object) -> None:
        await Future()

    admin._async_list_partition_offsets = forever
    with pytest.raises(BackendUnavailable, match="reading the bounds of in"):
        bus.bounds("in")
    assert bus.bounds("in") == before
    assert bus._clients.admin is not admin


def test_a_bus_that_was_opened_before_its_broker_works_when_it_is_there(broker: Broker, bus: Bus) -> None:
    broker.stop()
    with open_bus(f"kafka://{broker.address}?{QUICK}") as early:
        with pytest.raises(BackendUnavailable):
            early.publish([Outgoing("in", b"k", b"x")])
        broker.start()
        patiently(lambda: early.publish([Outgoing("in", b"k", b"x")]))


def test_a_proxy_before_a_dead_broker_is_not_besieged(tmp_path: Path) -> None:
    require_tools()
    cluster = Cluster(tmp_path, 1)
    try:
        cluster.start()
        with open_bus(cluster.uri) as bus:
            bus.apply_topics([TopicSpec("in", 1)])
            with bus.consumer("patient", ["in"]) as consumer:
                bus.publish([Outgoing("in", b"k", b"1")])
                consumer.commit(take(consumer))
                (proxy,) = cluster.proxies
                proxy.change(Weather.REFUSED)
                before = proxy.accepted
                seen = time.monotonic() + 4.0
                while time.monotonic() < seen:
                    with contextlib.suppress(BackendUnavailable):
                        consumer.poll(10, 0.5)
                assert 2 <= proxy.accepted - before <= 100  # a loop without pauses makes a thousand
                proxy.change(Weather.FINE)
                patiently(lambda: bus.publish([Outgoing("in", b"k", b"2")]))
                assert [record.value for record in take(consumer)] == [b"2"]
    finally:
        cluster.stop()


def test_work_longer_than_the_poll_interval_keeps_its_partition(bus: Bus) -> None:
    bus.publish([Outgoing("in", b"k", b"long work")])
    options = ConsumerOptions(session_timeout_s=6.0, rebalance_timeout_s=6.0)
    with bus.consumer("slow", ["in"], options=options) as consumer:
        records = take(consumer)
        time.sleep(14.0)
        consumer.commit(records)
    position = bus.positions("slow")
    assert list(position.values()) == [records[-1].offset + 1]
