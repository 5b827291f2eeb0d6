"""A member of a Kafka group that commits by transactions.

Threads: the caller's, kafka-python's (heartbeats and rebalance callbacks), and one of ours, the keeper. The
keeper polls with every partition paused while the caller works, so that work may take longer than the
cluster's poll interval. When a rebalance then takes a partition away, `_base` forgets it and the commit of
its records is refused here; a rebalance that this process did not notice is refused by the cluster, by the
generation in the transaction. And because kafka-python may keep its place in a partition that was with
another member meanwhile, each new generation is checked against the committed positions (`_verify`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

from charter.bus._kafka_calls import opened
from charter.bus._kafka_client import KafkaOptions, translate, translated
from charter.bus._kafka_join import remember_joins
from charter.bus._kafka_producer import TransactionalProducer, Undecided
from charter.bus.base import (
    MAX_POLL_BYTES,
    ConsumerOptions,
    DeadLetter,
    Outgoing,
    Partition,
    Record,
    TopicSpec,
    end_positions,
    is_for,
)
from charter.bus.messages import encode_dead_letter
from charter.errors import BusError, Fenced
from charter.telemetry.logs import get_logger
from kafka import KafkaConsumer as Client
from kafka import TopicPartition
from kafka import errors as kafka_errors

_log = get_logger(__name__)

POLL_SLICE_S = 0.5
"""A poll gives the lock up this often, so that the keeper and `close` do not wait long."""


class KafkaGroupConsumer:
    """A `charter.bus.base.Consumer` on Kafka. Made by `KafkaBus.consumer`."""

    def __init__(
        self,
        options: KafkaOptions,
        group: str,
        member: str,
        named: bool,
        topics: Sequence[str],
        consumer_options: ConsumerOptions,
        specs: Callable[[Sequence[str]], Mapping[str, TopicSpec]],
        on_close: Callable[[KafkaGroupConsumer], None],
    ) -> None:
        """Subscribes; the group is joined at the first poll. `specs` describes topics by name."""
        self.group = group
        self.member = member
        self._options = options
        self._consumer_options = consumer_options
        self._specs = specs
        self._on_close = on_close
        self._producer = TransactionalProducer(options, f"charter-{group}-{member}")
        self._base: dict[Partition, int] = {}
        """For each partition with records in hand, the offset of the first of them."""
        self._lost: set[Partition] = set()
        """Partitions that went to another member while their records were in hand."""
        self._verified: tuple[int, str] | None = None
        """The generation and member id under which every place in a partition is known to be right."""
        self._unsettled: dict[Partition, int] | None = None
        """Positions of a commit of which it is not known whether it happened."""
        self._fenced: Fenced | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._last_poll = time.monotonic()
        with translated(options.where, f"joining group {group!r}"):
            settings = _settings(options, group, member if named else None, consumer_options)
            self._client = opened(Client, options, settings)
            remember_joins(self._client._coordinator)
            self._client.subscribe(list(topics), listener=_Listener(self._on_lost))
        self._keeper = threading.Thread(target=self._keep, name=f"charter-bus-{group}-{member}", daemon=True)
        self._keeper.start()

    def poll(self, max_records: int = 100, timeout: float = 1.0) -> list[Record]:
        """See `Consumer.poll`."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            with self._lock:
                self._check()
                self._settle()
                found = self._poll_client(max_records, min(left, POLL_SLICE_S))
                # A join is answered when every member has come, and until then the coordinator answers
                # nothing else on this connection; before it ends there is nothing to verify for.
                if found or not self._client._coordinator.need_rejoin():
                    self._verify(self._client.group_metadata(), found)
                records = self._take(found)
            if records or time.monotonic() >= deadline:
                return records

    def _poll_client(self, max_records: int, timeout: float) -> dict[Any, list[Any]]:
        self._last_poll = time.monotonic()
        try:
            found: dict[Any, list[Any]] = self._client.poll(int(timeout * 1000), max_records)
            if self._consumer_options.from_end:
                for place in self._client.assignment():
                    self._client.position(place, timeout_ms=5000)  # fixes "the end" as it is now
        except kafka_errors.KafkaError as error:
            raise self._remembered(error, "polling") from error
        return found

    def _take(self, found: dict[Any, list[Any]]) -> list[Record]:
        taken = []
        for messages in found.values():
            mine = [record for record in map(to_record, messages) if is_for(record, self.group)]
            if mine:
                self._base.setdefault(mine[0].source, mine[0].offset)
                self._lost.discard(mine[0].source)
                taken += mine
        return taken

    def commit(
        self,
        records: Sequence[Record],
        publish: Sequence[Outgoing] = (),
        dead_letters: Sequence[DeadLetter] = (),
    ) -> None:
        """See `Consumer.commit`."""
        ends = end_positions(records)
        messages = [*publish, *(encode_dead_letter(self.group, letter) for letter in dead_letters)]
        with self._lock:
            self._check()
            if self._unsettled == ends and self._settle():
                return  # the attempt that seemed to fail had succeeded
            self._settle()
            if not ends and not messages:
                return
            specs = self._specs([message.topic for message in messages])
            # First the generation, then the ownership: a partition lost in between fails one of the checks.
            metadata = self._client.group_metadata()
            try:
                if ends:
                    self._verify(metadata, {})
                    self._check_owned(ends, metadata)
                self._producer.transact(messages, specs, ends, metadata)
            except Undecided:
                self._unsettled = ends
                if not self._settle():
                    raise
            except Fenced as error:
                self._on_fenced(error)
                raise
            self._advance(ends)

    def _check_owned(self, ends: Mapping[Partition, int], metadata: Any) -> None:
        if metadata.generation_id < 0:
            # The cluster would take such a commit for one of a client without groups, and not fence it.
            raise Fenced(
                f"group {self.group!r}: {self.member!r} was given up while it worked; its work is lost"
            )
        # Records may come from elsewhere than `poll` (a trainer fetches them): what counts is who owns them.
        owned = self.assignment()
        lost = [place for place in ends if place in self._lost or place not in owned]
        if lost:
            raise Fenced(
                f"group {self.group!r}: {lost[0].topic}/{lost[0].partition} went to another member while "
                f"{self.member!r} worked; its work is thrown away, the other does it"
            )

    def _verify(self, metadata: Any, found: dict[Any, list[Any]]) -> None:
        """In a new generation: goes on from the committed position where another member has moved it.

        Removes the records from `found` that another member has had.
        """
        generation = (metadata.generation_id, metadata.member_id)
        if generation == self._verified:
            return
        for tp in list(self._client.assignment() or ()):
            with translated(self._options.where, "reading positions"):
                committed = self._client.committed(tp, timeout_ms=self._timeout_ms)
            place = Partition(tp.topic, tp.partition)
            first = found[tp][0].offset if found.get(tp) else self._client.position(tp, timeout_ms=5000)
            first = self._base.get(place, first)
            if committed is not None and first is not None and committed > first:
                _log.warning(
                    "another member went on", group=self.group, topic=tp.topic, partition=tp.partition
                )
                self._forget_in_hand(place)
                found.pop(tp, None)
                self._client.seek(tp, committed)
        self._verified = generation

    def _on_fenced(self, error: Fenced) -> None:
        if isinstance(error.__cause__, kafka_errors.FencedInstanceIdError):
            self._fenced = error
        self.rewind()

    def _advance(self, ends: Mapping[Partition, int]) -> None:
        """The positions are committed: what lies before them is not in hand any more."""
        owned = self._client.assignment()
        for place, end in ends.items():
            tp = TopicPartition(*place)
            position = self._client.position(tp, timeout_ms=5000) if tp in owned else None
            if position is not None and position > end:
                self._base[place] = end
                continue
            self._base.pop(place, None)
            if position is not None and position < end:  # committed ahead of what was polled
                self._client.seek(tp, end)

    def _settle(self) -> bool:
        """Finds out whether an undecided commit happened; True if there was one and it did.

        Raises `BackendUnavailable` when that cannot be known yet.
        """
        if self._unsettled is None:
            return False
        self._producer.reopen()  # the cluster finishes or aborts the transaction
        with translated(self._options.where, "reading positions"):
            happened = all(
                (self._client.committed(TopicPartition(*place), timeout_ms=self._timeout_ms) or 0) >= end
                for place, end in self._unsettled.items()
            )
        ends, self._unsettled = self._unsettled, None
        if happened and ends:
            self._advance(ends)
        return happened and bool(ends)

    def dead_letter(self, record: Record, error: str, attempts: int) -> None:
        """See `Consumer.dead_letter`."""
        self.commit([record], dead_letters=[DeadLetter(record, error, attempts)])

    def rewind(self) -> None:
        """See `Consumer.rewind`."""
        with self._lock:
            owned = self._client.assignment()
            for place, offset in list(self._base.items()):
                if TopicPartition(*place) in owned:
                    self._client.seek(TopicPartition(*place), offset)
            self._base.clear()
            self._lost.clear()

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """See `Consumer.seek`."""
        with self._lock:
            place = TopicPartition(topic, partition)
            if place not in self._client.assignment():
                raise BusError(
                    f"group {self.group!r}: {topic}/{partition} is not owned by {self.member!r}; poll first"
                )
            self._client.seek(place, offset)
            self._base.pop(Partition(topic, partition), None)

    def assignment(self) -> frozenset[Partition]:
        """See `Consumer.assignment`."""
        return frozenset(Partition(p.topic, p.partition) for p in self._client.assignment() or ())

    def close(self) -> None:
        """See `Consumer.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._on_close(self)
            self._client.close(autocommit=False, timeout_ms=2000)
            self._producer.close()

    @property
    def _timeout_ms(self) -> int:
        return int(self._options.timeout_s * 1000)

    def _check(self) -> None:
        if self._closed:
            raise BusError(f"group {self.group!r}: consumer {self.member!r} is closed; make another")
        if self._fenced is not None:
            raise self._fenced

    def _remembered(self, error: kafka_errors.KafkaError, doing: str) -> Exception:
        """The translation of an error; that another process runs under this name is remembered."""
        translation = translate(error, self._options.where, f"{doing} as member {self.member!r}")
        if isinstance(translation, Fenced) and isinstance(error, kafka_errors.FencedInstanceIdError):
            self._fenced = translation
        return translation

    def _on_lost(self, places: Sequence[Any]) -> None:
        """Called on kafka-python's thread: must not wait for our lock."""
        for place in places:
            self._forget_in_hand(Partition(place.topic, place.partition))

    def _forget_in_hand(self, place: Partition) -> None:
        """The records in hand of this partition are another member's now; their commit will be refused."""
        if self._base.pop(place, None) is not None:
            self._lost.add(place)

    def _keep(self) -> None:
        """Keeps the membership while the caller works for longer than the cluster would wait for a poll."""
        interval = self._consumer_options.rebalance_timeout_s / 3
        while not self._closed:
            time.sleep(min(1.0, interval / 4))
            if time.monotonic() - self._last_poll < interval or not self._lock.acquire(timeout=1.0):
                continue
            try:
                if not self._closed and self._fenced is None:
                    self._poll_paused()
            except kafka_errors.KafkaError as error:
                translation = self._remembered(error, "keeping the membership")
                _log.warning("the membership could not be kept", group=self.group, error=str(translation))
            finally:
                self._lock.release()

    def _poll_paused(self) -> None:
        """Takes part in the group's life without taking records."""
        self._last_poll = time.monotonic()
        owned = self._client.assignment() or set()
        self._client.pause(*owned)
        try:
            stray = self._client.poll(100)
        finally:
            self._client.resume(*(self._client.assignment() or set()))
        if self._client._coordinator.need_rejoin():
            self._last_poll = 0.0  # a rebalance is under way: come back soon
        for place, messages in stray.items():  # of partitions that came to us just now
            self._client.seek(place, messages[0].offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    def __init__(self, on_lost: Callable[[Sequence[Any]], None]) -> None:
        self._on_lost = on_lost

    def on_partitions_revoked(self, revoked: Sequence[Any]) -> None:
        self._on_lost(revoked)

    def on_partitions_assigned(self, assigned: Sequence[Any]) -> None:
        pass


def _settings(
    options: KafkaOptions, group: str, instance: str | None, consumer_options: ConsumerOptions
) -> dict[str, Any]:
    session_ms = int(consumer_options.session_timeout_s * 1000)
    return {
        **options.consumer(),
        "group_id": group,
        "group_instance_id": instance,
        "auto_offset_reset": "latest" if consumer_options.from_end else "earliest",
        "partition_assignment_strategy": (CooperativeStickyAssignor,),
        "session_timeout_ms": session_ms,
        "heartbeat_interval_ms": max(100, min(1000, session_ms // 4)),
        "max_poll_interval_ms": max(session_ms, int(consumer_options.rebalance_timeout_s * 1000)),
        "fetch_max_bytes": MAX_POLL_BYTES,
    }


def to_record(message: Any) -> Record:
    """A record of ours from one of kafka-python's."""
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        key=message.key or b"",
        value=message.value,
        headers=dict(message.headers),
        timestamp_ms=message.timestamp,
    )
