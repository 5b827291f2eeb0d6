"""The log's one interface: records, what a consumer promises, and the operation that matters.

That operation is *take a batch, do the work, publish the results and commit the position as one act*
(`Consumer.poll`, then `Consumer.commit`). Two implementations pass one conformance suite: an embedded log in
SQLite (`charter.bus.sqlite`) and Kafka's transactions (`charter.bus.kafka`). Everything here is synchronous
and thread-safe; asynchronous callers use `asyncio.to_thread`, as `charter.bus.worker` does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""The largest key and value together that either implementation takes."""

MAX_POLL_BYTES = 64 * 1024 * 1024
"""A poll stops adding records beyond this size, so that large messages do not fill the memory."""

REPLAY_GROUP_HEADER = "charter-replay-group"
"""On a replayed dead letter: the only group that it is for, since the others have had it already."""


class Delivery(enum.Enum):
    """What a worker promises about each message of its topics."""

    EXACTLY_ONCE = "exactly_once"
    """Results on the bus and the position move as one act: a crash at any instant loses no result and
    doubles none. What the work does *elsewhere* (a file, a call) happens at least once, so it must be safe
    to repeat; let it be named after the record."""
    AT_MOST_ONCE = "at_most_once"
    """The position moves before the work. A crash loses the batch in hand and repeats nothing."""


class Cleanup(enum.StrEnum):
    """What becomes of old messages."""

    DELETE = "delete"
    """They go when they are older than the topic's retention."""
    COMPACT = "compact"
    """The newest message of each key stays for ever; a message without value removes its key."""


class Partition(NamedTuple):
    """One ordered part of a topic."""

    topic: str
    partition: int


class Position(NamedTuple):
    """The place of one message."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish. Messages with the same key keep their order."""

    topic: str
    key: bytes
    value: bytes | None
    """None on a compacted topic removes the key."""
    headers: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """A message as it lies in the log."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes | None
    headers: Mapping[str, bytes]
    timestamp_ms: int
    """Wall clock at the publisher, milliseconds since the epoch."""

    @property
    def position(self) -> Position:
        """Where the record lies."""
        return Position(self.topic, self.partition, self.offset)

    @property
    def source(self) -> Partition:
        """The partition that the record lies in."""
        return Partition(self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be used, and why."""

    record: Record
    error: str
    """One sentence for the person who will read `charter dead-letters list`."""
    attempts: int


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as `topics.yaml` wants it."""

    name: str
    partitions: int
    key: str = ""
    """The field of the message that is its key; for people and for the chart."""
    message: str = ""
    """Full name of the protobuf message, for example `charter.v1.RolloutEvent`."""
    retention_ms: int | None = None
    """None keeps messages for ever."""
    cleanup: Cleanup = Cleanup.DELETE
    max_message_bytes: int = MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class TopicChange:
    """One line of a plan: what `apply_topics` would do, or did."""

    topic: str
    action: str
    """`create`, `add partitions`, `configure`, or `refuse` for what cannot be done in place."""
    detail: str


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a partition holds."""

    first: int
    """Offset of the oldest record that is still there, or would be."""
    end: int
    """Offset that the next record will get."""


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a group is behind in one partition."""

    group: str
    topic: str
    partition: int
    position: int
    """Offset of the next record that the group will take."""
    end: int
    records: int
    """Records between the two; an upper bound after compaction, and on Kafka of a long backlog."""
    oldest_ms: int | None = None
    """Timestamp of the oldest record not yet taken; None when there is none."""


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """How a consumer behaves in its group."""

    session_timeout_s: float = 10.0
    """Without a sign of life for this long, its partitions go to others. A thread gives the signs, so work
    may take any time; only a dead, stopped or unreachable process falls silent."""
    rebalance_timeout_s: float = 300.0
    """A partition that another member should have stays with a worker that is in the middle of a batch,
    for at most this long."""
    from_end: bool = False
    """Where a group without a position starts: at the oldest record, or (True) behind the newest."""


class Consumer(Protocol):
    """One member of a group. Each partition of the topics belongs to one live member at a time."""

    group: str
    member: str

    def poll(self, max_records: int = 100, timeout: float = 1.0) -> list[Record]:
        """Takes the next records of this member's partitions, in order within each; empty after `timeout` s.

        Returned records are in hand until they are committed; the next poll goes on behind them. Raises
        `Fenced` when another process runs under this member's name (stop), and `BackendUnavailable` when
        the log cannot be reached now (wait, and poll again).
        """
        ...

    def commit(
        self,
        records: Sequence[Record],
        publish: Sequence[Outgoing] = (),
        dead_letters: Sequence[DeadLetter] = (),
    ) -> None:
        """Publishes, buries and moves the positions behind `records`, as one act: all of it or nothing.

        In each partition the position moves behind the last of `records`, so give them in the order of
        `poll` and leave none out; records that were fetched do as well, of partitions that are owned.
        Raises `Fenced` when a partition went to another member meanwhile: throw the work away and poll
        again, which goes on from the committed positions of what is still owned.
        `BackendUnavailable`: commit the same again, and it has happened once; or poll again.
        """
        ...

    def dead_letter(self, record: Record, error: str, attempts: int) -> None:
        """Buries one record and moves the position behind it, as one act."""
        ...

    def rewind(self) -> None:
        """Forgets the records in hand: the next poll goes on from the committed positions."""
        ...

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """The next poll of an owned partition goes on from `offset`; the committed position stays."""
        ...

    def assignment(self) -> frozenset[Partition]:
        """The partitions that this member owned at the last poll."""
        ...

    def close(self) -> None:
        """Leaves the group, so that others take over at once. Records in hand go back. Safe to repeat.

        Kafka keeps the place of a member with a name until its session runs out, so that a restart moves
        nothing.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Bus(Protocol):
    """A partitioned, durable log."""

    def publish(self, messages: Sequence[Outgoing]) -> tuple[Position, ...]:
        """Appends all of `messages`, or none of them, and says where they lie.

        Raises `BusError` for an unknown topic or a message over the topic's limit, and
        `BackendUnavailable` when the log cannot be reached now: publish the same messages again (with the
        same bus), and they are there once.
        """
        ...

    def consumer(
        self,
        group: str,
        topics: Sequence[str],
        member: str | None = None,
        options: ConsumerOptions | None = None,
    ) -> Consumer:
        """Joins a group.

        With a `member` name (a StatefulSet's ordinal, say) a restarted process takes its own place back at
        once, and fences the process that held it. Without one, the name is made up.
        """
        ...

    def fetch(
        self, topic: str, partition: int, offset: int, max_records: int = 100, timeout: float = 0.0
    ) -> list[Record]:
        """Reads from a place, outside any group; waits up to `timeout` seconds where there is nothing yet.

        An offset below the oldest record reads from the oldest.
        """
        ...

    def bounds(self, topic: str) -> dict[int, Bounds]:
        """Oldest and next offset of each partition."""
        ...

    def positions(self, group: str) -> dict[Partition, int]:
        """The committed positions of a group."""
        ...

    def lag(self, group: str, topics: Sequence[str]) -> list[Lag]:
        """How far the group is behind, for each partition of `topics`."""
        ...

    def plan_topics(self, specs: Sequence[TopicSpec]) -> list[TopicChange]:
        """What `apply_topics` would do; empty when everything is as wanted."""
        ...

    def apply_topics(self, specs: Sequence[TopicSpec]) -> list[TopicChange]:
        """Creates and adjusts topics; safe to repeat. Never deletes a topic and never removes partitions."""
        ...

    def topics(self) -> dict[str, TopicSpec]:
        """The topics that exist."""
        ...

    def close(self) -> None:
        """Closes the bus and its consumers. Safe to repeat."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def is_for(record: Record, group: str) -> bool:
    """False for a replayed dead letter of another group; `Consumer.poll` leaves those out by itself."""
    addressee = record.headers.get(REPLAY_GROUP_HEADER)
    return addressee is None or addressee.decode() == group


def end_positions(records: Sequence[Record]) -> dict[Partition, int]:
    """The position behind the last record of each partition."""
    ends: dict[Partition, int] = {}
    for record in records:
        ends[record.source] = max(ends.get(record.source, 0), record.offset + 1)
    return ends


def partition_for(key: bytes, partitions: int) -> int:
    """The partition of a key: Kafka's own rule (murmur2), so both implementations agree with every client."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    """MurmurHash2 with Kafka's seed (org.apache.kafka.common.utils.Utils.murmur2)."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(data)) & mask
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    tail = data[whole:]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)
