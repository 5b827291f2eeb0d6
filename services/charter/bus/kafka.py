"""The log on a Kafka cluster, by kafka-python's transactions.

    kafka://host:port[,host:port][?tls=true&ca=…&cert=…&key=…&sasl=SCRAM-SHA-512&user=…&replication=3&…]

`charter.bus._kafka_client` lists the options and says how errors become sentences,
`charter.bus._kafka_producer` how a transaction stays bounded and decided, `charter.bus._kafka_consumer` how a
member keeps its partitions during long work.

Offsets have holes here: the marker that ends a transaction takes one in each partition that it touched.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from kafka.admin import ConfigResource, ConfigResourceType
from kafka.protocol.consumer import IsolationLevel

from charter.bus._kafka_calls import Clients
from charter.bus._kafka_client import OVERHEAD_BYTES, KafkaOptions, translated
from charter.bus._kafka_consumer import KafkaGroupConsumer, to_record
from charter.bus._kafka_lag import Backlog
from charter.bus._kafka_positions import positions as read_positions
from charter.bus._kafka_producer import TransactionalProducer, Undecided, check_messages
from charter.bus.base import (
    Bounds,
    Cleanup,
    ConsumerOptions,
    Lag,
    Outgoing,
    Partition,
    Position,
    Record,
    TopicChange,
    TopicSpec,
)
from charter.bus.topics import plan_topics
from charter.errors import BackendUnavailable, BusError
from kafka import TopicPartition
from kafka import errors as kafka_errors

TOPICS_AGE_S = 10.0
"""How long what is known about the topics is trusted."""

_LOOK_MS = 20
"""How long a poll waits. It passes markers at once, but comes back empty only when its time is over."""

_EARLIEST, _LATEST = -2, -1


class KafkaBus:
    """A `charter.bus.base.Bus` on a cluster."""

    def __init__(self, options: KafkaOptions) -> None:
        """Connects at the first use, so that a service starts while its broker is away."""
        self.options = options
        self._lock = threading.RLock()
        self._name = uuid.uuid4().hex
        self._publisher = TransactionalProducer(options, f"charter-publisher-{self._name}")
        self._publications = 0
        self._undecided: tuple[tuple[Outgoing, ...], dict[Partition, int], list[Position]] | None = None
        self._clients = Clients(options)
        self._consumers: list[KafkaGroupConsumer] = []
        self._backlogs: dict[tuple[str, Partition], Backlog] = {}
        self._holes: dict[Any, tuple[int, int]] = {}
        """Of a partition, the last range in which a reader found markers alone: it is not read again."""
        self._topics: dict[str, TopicSpec] = {}
        self._topics_read = -TOPICS_AGE_S

    def publish(self, messages: Sequence[Outgoing]) -> tuple[Position, ...]:
        """See `Bus.publish`.

        A counter travels in each transaction as a position of a group of this bus's own, so that a
        transaction that the cluster did not answer can be told to have happened or not: where that is not
        known at once, publishing the same messages again finds out first.
        """
        if not messages:
            return ()
        specs = self._specs([message.topic for message in messages])
        check_messages(messages, specs)
        with self._lock:
            earlier = self._settle(messages)
            if earlier is not None:
                return earlier
            self._publications += 1
            mark = {Partition(messages[0].topic, 0): self._publications}
            found: list[Position] = []
            try:
                return self._publisher.transact(messages, specs, mark, self._mark_group, found)
            except Undecided:
                self._undecided = (tuple(messages), mark, found)
                earlier = self._settle(messages)
                if earlier is None:
                    raise
                return earlier

    @property
    def _mark_group(self) -> str:
        return f"charter-publisher-{self._name}"

    def _settle(self, messages: Sequence[Outgoing]) -> tuple[Position, ...] | None:
        """Finds out about an undecided publication; where it lies, if it happened and was of `messages`.

        Raises `BackendUnavailable` when that cannot be known yet.
        """
        if self._undecided is None:
            return None
        published, mark, found = self._undecided
        self._publisher.reopen()  # the cluster finishes or aborts the transaction
        positions = self.positions(self._mark_group)
        self._undecided = None
        happened = all(positions.get(place, 0) >= count for place, count in mark.items())
        return tuple(found) if happened and published == tuple(messages) else None

    def consumer(
        self,
        group: str,
        topics: Sequence[str],
        member: str | None = None,
        options: ConsumerOptions | None = None,
    ) -> KafkaGroupConsumer:
        """See `Bus.consumer`."""
        specs = self._specs(topics)
        for topic in topics:
            _spec(specs, topic)
        consumer = KafkaGroupConsumer(
            self.options,
            group,
            member or f"member-{uuid.uuid4().hex[:12]}",
            named=member is not None,
            topics=topics,
            consumer_options=options or ConsumerOptions(),
            specs=self._specs,
            on_close=self._forget,
        )
        with self._lock:
            self._consumers.append(consumer)
        return consumer

    def _forget(self, consumer: KafkaGroupConsumer) -> None:
        # Without the lock: a consumer closes under its own lock, and lists are safe to change.
        if consumer in self._consumers:
            self._consumers.remove(consumer)

    def fetch(
        self, topic: str, partition: int, offset: int, max_records: int = 100, timeout: float = 0.0
    ) -> list[Record]:
        """See `Bus.fetch`."""
        if not 0 <= partition < _spec(self._specs([topic]), topic).partitions:
            raise BusError(f"topic {topic!r} has no partition {partition}")
        place = TopicPartition(topic, partition)
        deadline = time.monotonic() + timeout
        while True:
            with self._calling(f"reading {topic}/{partition}"):
                end = self._offsets([place], _LATEST)[place]
                known_empty = self._holes.get(place) == (offset, end)
                records = [] if known_empty or offset >= end else self._read(place, offset, end, max_records)
                if not records:
                    self._holes[place] = (offset, end)
            if records or time.monotonic() >= deadline:
                return records
            time.sleep(0.02)

    def _read(self, place: Any, offset: int, end: int, max_records: int) -> list[Record]:
        """Records from `offset` on; empty when only holes lie between it and `end`."""
        reader = self._clients.reader
        first = self._offsets([place], _EARLIEST)[place]
        reader.assign([place])
        reader.seek(place, max(offset, first))
        deadline = time.monotonic() + self.options.timeout_s
        while time.monotonic() < deadline:
            found = reader.poll(_LOOK_MS, max_records).get(place, [])
            records = [to_record(message) for message in found]
            if records or (reader.position(place, timeout_ms=5000) or 0) >= end:
                return records
        raise kafka_errors.KafkaTimeoutError(f"nothing came from {place.topic}/{place.partition}")

    def bounds(self, topic: str) -> dict[int, Bounds]:
        """See `Bus.bounds`."""
        places = self._places(topic)
        with self._calling(f"reading the bounds of {topic}"):
            first, end = self._offsets(places, _EARLIEST), self._offsets(places, _LATEST)
        return {place.partition: Bounds(first[place], end[place]) for place in places}

    def positions(self, group: str) -> dict[Partition, int]:
        """See `Bus.positions`."""
        places = [place for name in self._specs([]) for place in self._places(name)]
        with self._calling(f"reading the positions of group {group!r}"):
            return read_positions(self._clients.admin, group, places, self.options.timeout_s)

    def lag(self, group: str, topics: Sequence[str]) -> list[Lag]:
        """See `Bus.lag`. Exact for a short backlog, an upper bound for a long one (`_kafka_lag`)."""
        places = [place for topic in topics for place in self._places(topic)]
        with self._calling(f"reading the positions of group {group!r}"):
            # A transaction that its dead owner left open must not keep others from knowing roughly.
            positions = read_positions(self._clients.admin, group, places, 0.2, or_visible=True)
        lags = []
        for topic in topics:
            for partition, bounds in self.bounds(topic).items():
                place = Partition(topic, partition)
                position = max(positions.get(place, 0), bounds.first)
                with self._calling(f"reading {topic}/{partition}"):
                    backlog = self._backlogs.setdefault((group, place), Backlog())
                    records, oldest = backlog.count(place, position, bounds.end, self._read_place)
                lags.append(Lag(group, topic, partition, position, bounds.end, records, oldest))
        return lags

    def _read_place(self, place: Partition, offset: int, end: int, max_records: int) -> list[Record]:
        return self._read(TopicPartition(*place), offset, end, max_records)

    def plan_topics(self, specs: Sequence[TopicSpec]) -> list[TopicChange]:
        """See `Bus.plan_topics`."""
        return plan_topics(self._known(specs), specs)

    def apply_topics(self, specs: Sequence[TopicSpec]) -> list[TopicChange]:
        """See `Bus.apply_topics`."""
        changes = self.plan_topics(specs)
        wanted = {spec.name: spec for spec in specs}
        with self._calling("changing topics"):
            for change in changes:
                self._apply(change, wanted[change.topic])
            created = [change.topic for change in changes if change.action == "create"]
            if created:
                self._clients.admin.wait_for_topics(created, timeout_ms=int(self.options.timeout_s * 1000))
        if changes:
            self._await_topics(specs)
            self._topics_read = -TOPICS_AGE_S
        return changes

    def _await_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Waits until the brokers have heard of what the controller has decided."""
        deadline = time.monotonic() + self.options.timeout_s
        while late := [c for c in self.plan_topics(specs) if c.action != "refuse"]:
            if time.monotonic() > deadline:
                raise BackendUnavailable(
                    f"{self.options.where}: topic {late[0].topic!r} is not yet as asked ({late[0].detail}); "
                    "apply the topics again"
                )
            time.sleep(0.05)

    def _apply(self, change: TopicChange, spec: TopicSpec) -> None:
        admin = self._clients.admin
        if change.action == "create":
            options = {
                "num_partitions": spec.partitions,
                "replication_factor": self.options.replication,
                "configs": topic_configs(spec, self.options.replication),
            }
            try:
                admin.create_topics({spec.name: options})
            except kafka_errors.TopicAlreadyExistsError:
                return  # another process was faster
        elif change.action == "add partitions":
            admin.create_partitions({spec.name: spec.partitions})
        elif change.action == "configure":
            resource = ConfigResource(
                ConfigResourceType.TOPIC, spec.name, topic_configs(spec, self.options.replication)
            )
            admin.alter_configs([resource])

    def topics(self) -> dict[str, TopicSpec]:
        """See `Bus.topics`."""
        with self._calling("reading topics"):
            described = self._clients.admin.describe_topics()
            partitions = {t["name"]: len(t["partitions"]) for t in described if not t["name"].startswith("_")}
            if not partitions:
                return {}
            resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in partitions]
            configs = self._clients.admin.describe_configs(resources, config_filter="all")["topic"]
            self._topics = {name: _from_configs(name, n, configs[name]) for name, n in partitions.items()}
            self._topics_read = time.monotonic()
            return dict(self._topics)

    def _known(self, specs: Sequence[TopicSpec]) -> dict[str, TopicSpec]:
        """The topics that exist, with what a cluster does not keep taken from `specs`."""
        wanted = {spec.name: spec for spec in specs}
        return {
            name: replace(spec, key=wanted[name].key, message=wanted[name].message)
            for name, spec in self.topics().items()
            if name in wanted
        }

    def _specs(self, names: Sequence[str]) -> dict[str, TopicSpec]:
        """What is known about topics; asked anew when it is old or lacks one of `names`."""
        old = time.monotonic() - self._topics_read > TOPICS_AGE_S
        if not old and all(name in self._topics for name in names):
            return self._topics
        specs = self.topics()
        self._check_hidden([name for name in names if name not in specs])
        return specs

    def _check_hidden(self, names: Sequence[str]) -> None:
        """A topic that the user may not see is in no list; only when asked for by name it is refused."""
        if not names:
            return
        with self._calling("reading topics"):
            for topic in self._clients.admin.describe_topics(list(names)):
                if topic["error_code"] == kafka_errors.TopicAuthorizationFailedError.errno:
                    raise kafka_errors.TopicAuthorizationFailedError(topic["name"])

    def _places(self, topic: str) -> list[Any]:
        return [TopicPartition(topic, p) for p in range(_spec(self._specs([topic]), topic).partitions)]

    def _offsets(self, places: Sequence[Any], which: int) -> dict[Any, int]:
        answer = self._clients.admin.list_partition_offsets(
            dict.fromkeys(places, which), isolation_level=IsolationLevel.READ_COMMITTED
        )
        return {place: answer[place].offset for place in places}

    @contextmanager
    def _calling(self, doing: str) -> Iterator[None]:
        """One call of the cluster at a time; clients that could not do it are given up."""
        with self._lock:
            try:
                with translated(self.options.where, doing):
                    yield
            except BackendUnavailable:
                self._clients.give_up()
                raise

    def close(self) -> None:
        """See `Bus.close`."""
        for consumer in list(self._consumers):
            consumer.close()
        with self._lock:
            self._publisher.close()
            self._clients.give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _spec(specs: dict[str, TopicSpec], topic: str) -> TopicSpec:
    if topic not in specs:
        raise BusError(f"topic {topic!r} does not exist; create it with `charter topics apply`")
    return specs[topic]


def topic_configs(spec: TopicSpec, replication: int) -> dict[str, str]:
    """How a broker is to keep a topic. The Helm chart says the same (tests/helm)."""
    configs = {
        "cleanup.policy": spec.cleanup.value,
        "retention.ms": str(-1 if spec.retention_ms is None else spec.retention_ms),
        "max.message.bytes": str(spec.max_message_bytes + OVERHEAD_BYTES),
    }
    return configs | ({"min.insync.replicas": "2"} if replication >= 3 else {})


def _from_configs(name: str, partitions: int, configs: dict[str, Any]) -> TopicSpec:
    def value(key: str) -> str:
        return str(configs[key]["value"])

    retention_ms = int(value("retention.ms"))
    policy = value("cleanup.policy")
    return TopicSpec(
        name=name,
        partitions=partitions,
        retention_ms=None if retention_ms < 0 else retention_ms,
        cleanup=Cleanup.COMPACT if "compact" in policy else Cleanup.DELETE,
        max_message_bytes=int(value("max.message.bytes")) - OVERHEAD_BYTES,
    )
