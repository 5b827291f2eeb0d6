"""Transactions on Kafka, in bounded time, with an answer to "did it happen?".

kafka-python waits without bound for a broker that is gone. Here every step has a deadline; when it passes,
the producer is given up, and the next use opens another with the same transactional id. Opening it makes the
cluster finish or abort what the first left behind, and fences it; afterwards the group's positions, which
travelled in the transaction, tell whether it was committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kafka.structs import OffsetAndMetadata

from charter.bus._kafka_calls import opened
from charter.bus._kafka_client import KafkaOptions, translate, translated
from charter.bus.base import Outgoing, Partition, Position, TopicSpec, partition_for
from charter.errors import BackendUnavailable, BusError, CharterError
from kafka import KafkaProducer, TopicPartition
from kafka import errors as kafka_errors


class TransactionalProducer:
    """One transactional id. One transaction at a time; a lock makes others wait."""

    def __init__(self, options: KafkaOptions, transactional_id: str) -> None:
        """Connects at the first use."""
        self.transactional_id = transactional_id
        self._options = options
        self._producer: KafkaProducer | None = None
        self._lock = threading.RLock()

    def transact(
        self,
        messages: Sequence[Outgoing],
        topics: Mapping[str, TopicSpec],
        offsets: Mapping[Partition, int],
        group_metadata: Any,
        found: list[Position] | None = None,
    ) -> tuple[Position, ...]:
        """Publishes `messages` and commits `offsets` for a group, as one act.

        Raises `BusError` before anything is sent for what cannot be sent, `Fenced`, or `Undecided` (a
        `BackendUnavailable`) when the cluster stopped answering: call `reopen`, then look at the positions.
        """
        check_messages(messages, topics)
        found = (
            [] if found is None else found
        )  # filled before the commit, for callers that settle an Undecided
        with self._lock:
            producer = self.reopen()
            deadline = time.monotonic() + self._options.timeout_s
            # The public methods wait without bound; these are the same steps with a deadline.
            manager = producer._transaction_manager
            try:
                producer.begin_transaction()
                found += self._send(producer, messages, topics, deadline)
                if offsets:
                    committed = {
                        TopicPartition(*place): OffsetAndMetadata(end, "", -1)
                        for place, end in offsets.items()
                    }
                    _await(producer, manager.send_offsets_to_transaction(committed, group_metadata), deadline)
                _await(producer, manager.begin_commit(), deadline)
                return tuple(found)
            except (kafka_errors.KafkaError, _TimedOut) as error:
                self._recover(producer, error)
                what = f"in a transaction of {self.transactional_id}"
                translation = translate(error, self._options.where, what)
                if isinstance(translation, BackendUnavailable):
                    raise Undecided(str(translation)) from error
                raise translation from error

    def _send(
        self,
        producer: KafkaProducer,
        messages: Sequence[Outgoing],
        topics: Mapping[str, TopicSpec],
        deadline: float,
    ) -> list[Position]:
        now_ms = int(time.time() * 1000)
        futures = []
        for message in messages:
            partition = partition_for(message.key, topics[message.topic].partitions)
            headers = list(message.headers.items())
            futures.append(
                producer.send(message.topic, message.value, message.key, headers, partition, now_ms)
            )
        # Not `flush`: it waits so long for each partition. Nothing lingers, so nothing needs flushing.
        metadata = [future.get(timeout=max(0.01, deadline - time.monotonic())) for future in futures]
        return [Position(m.topic, m.partition, m.offset) for m in metadata]

    def reopen(self) -> KafkaProducer:
        """A producer that is ready; what an earlier one left behind is finished or aborted by then."""
        with self._lock:
            if self._producer is None:
                with translated(self._options.where, f"opening {self.transactional_id}"):
                    producer = opened(
                        KafkaProducer, self._options, self._options.producer(self.transactional_id)
                    )
                    try:
                        producer.init_transactions()
                    except BaseException:
                        _discard(producer)
                        raise
                self._producer = producer
            return self._producer

    def _recover(self, producer: KafkaProducer, error: BaseException) -> None:
        """Aborts the transaction where that is quick, since readers wait for it; gives the producer up.

        Always: kafka-python keeps the positions of a transaction that the group refused, and would send them
        along with the next one, which moved positions back behind another member's work.
        """
        self._producer = None
        try:
            manager = producer._transaction_manager
            fenced = isinstance(error, _TimedOut | kafka_errors.ProducerFencedError)
            if not fenced and not manager.has_fatal_error():
                _await(producer, manager.begin_abort(), time.monotonic() + 5.0)
        except (kafka_errors.KafkaError, _TimedOut):
            pass  # the next producer of this name finishes or aborts it
        finally:
            _discard(producer)

    def close(self) -> None:
        """Closes the connection; safe to repeat."""
        with self._lock:
            producer, self._producer = self._producer, None
            if producer is not None:
                _discard(producer, 5.0)


def _discard(producer: KafkaProducer, timeout_s: float = 0.0) -> None:
    """Closes a producer without waiting for long for what it still wanted to send."""
    try:
        producer.close(timeout=timeout_s)
    except kafka_errors.KafkaError:
        producer._sender.force_close()
        producer._closed = True


class Undecided(BackendUnavailable):
    """A transaction may have been committed or not; `TransactionalProducer.reopen` settles it."""


class _TimedOut(Exception):  # noqa: N818
    pass


def _await(producer: KafkaProducer, result: Any, deadline: float) -> None:
    producer._sender.wakeup()
    if not result.wait(timeout_ms=max(10.0, (deadline - time.monotonic()) * 1000)):
        raise _TimedOut("the cluster did not answer in time")


def check_messages(messages: Sequence[Outgoing], topics: Mapping[str, TopicSpec]) -> None:
    """Raises `BusError` for the first message that no topic can take."""
    for message in messages:
        problem = refusal(message, topics.get(message.topic))
        if problem is not None:
            raise problem


def refusal(message: Outgoing, spec: TopicSpec | None) -> CharterError | None:
    """Why a topic cannot take a message; None when it can."""
    if spec is None:
        return BusError(f"topic {message.topic!r} does not exist; create it with `charter topics apply`")
    size = len(message.key) + len(message.value or b"")
    if size > spec.max_message_bytes:
        return BusError(
            f"a message of {size} bytes is over the {spec.max_message_bytes} of topic {spec.name!r}; "
            "split it, or raise max_message_bytes in topics.yaml"
        )
    return None
