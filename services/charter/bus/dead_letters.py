"""Dead letters: what is buried, and how it comes back.

The topic is compacted and a letter's key names the group and the record, so a replay removes the letter by
publishing its key without a value, in the same act as the message itself: nothing is replayed twice. The
replayed message carries a header that makes every other group pass over it: they have had it already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from charter.bus.base import REPLAY_GROUP_HEADER, Bus, Consumer, Outgoing, Record
from charter.bus.messages import decode
from charter.bus.topics import DEAD_LETTERS
from charter.errors import BusError, MalformedMessage
from charter.v1 import events_pb2

REPLAY_GROUP = "dead-letters-replay"
ORIGIN_HEADER = "charter-replayed-from"


@dataclass(frozen=True, slots=True)
class BuriedMessage:
    """A message on the dead-letter topic."""

    id: str
    """group/topic/partition/offset of the record that failed."""
    topic: str
    partition: int
    offset: int
    group: str
    error: str
    attempts: int
    buried_unix_ms: int
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]

    @classmethod
    def from_record(cls, record: Record) -> BuriedMessage:
        """Raises `MalformedMessage` for what is no dead letter."""
        event = decode(record, events_pb2.DeadLetterEvent)
        return cls(
            id=record.key.decode(errors="replace"),
            topic=event.topic,
            partition=event.partition,
            offset=event.offset,
            group=event.group,
            error=event.error,
            attempts=event.attempts,
            buried_unix_ms=event.created_unix_ms,
            key=event.key,
            value=event.value,
            headers=tuple(sorted(event.headers.items())),
        )

    def revived(self) -> tuple[Outgoing, Outgoing]:
        """The message again, for its group only, and the removal of the letter."""
        headers = {
            **dict(self.headers),
            REPLAY_GROUP_HEADER: self.group.encode(),
            ORIGIN_HEADER: f"{self.topic}/{self.partition}/{self.offset}".encode(),
        }
        again = Outgoing(self.topic, self.key, self.value, headers)
        return again, Outgoing(DEAD_LETTERS, self.id.encode(), None)


Wanted = Callable[[BuriedMessage], bool]


def everything(_: BuriedMessage) -> bool:
    """Wants every letter."""
    return True


def buried(bus: Bus, wanted: Wanted = everything) -> list[BuriedMessage]:
    """The letters that have not been replayed, oldest first."""
    found: dict[bytes, BuriedMessage] = {}
    for partition, bounds in bus.bounds(DEAD_LETTERS).items():
        for record in _read(bus, partition, bounds.first, bounds.end):
            _take(found, record)
    return [letter for letter in found.values() if wanted(letter)]


def replay(bus: Bus, wanted: Wanted = everything, patience_s: float = 30.0) -> list[BuriedMessage]:
    """Publishes letters to their origin again and removes them, as one act.

    Raises `BusError` when another replay is under way.
    """
    with bus.consumer(REPLAY_GROUP, [DEAD_LETTERS]) as consumer:
        records = _scan(bus, consumer, patience_s)
        found: dict[bytes, BuriedMessage] = {}
        for record in records:
            _take(found, record)
        chosen = [letter for letter in found.values() if wanted(letter)]
        if chosen:
            # Committing proves that no other replay has the topic: two at once would double messages.
            consumer.commit(records, publish=[message for letter in chosen for message in letter.revived()])
        return chosen


def _scan(bus: Bus, consumer: Consumer, patience_s: float) -> list[Record]:
    """The whole topic, read as the one member of the group that may."""
    ends = bus.bounds(DEAD_LETTERS)
    waited = 0.0
    while len(consumer.assignment()) < len(ends):
        if waited >= patience_s:
            raise BusError("another `charter dead-letters replay` is under way; wait until it has ended")
        consumer.poll(1, timeout=0.5)
        waited += 0.5
    return [
        record
        for partition, bounds in bus.bounds(DEAD_LETTERS).items()
        for record in _read(bus, partition, bounds.first, bounds.end)
    ]


def _read(bus: Bus, partition: int, offset: int, end: int) -> Iterator[Record]:
    while offset < end:
        records = bus.fetch(DEAD_LETTERS, partition, offset, max_records=500)
        if not records:
            return
        yield from records
        offset = records[-1].offset + 1


def _take(found: dict[bytes, BuriedMessage], record: Record) -> None:
    found.pop(record.key, None)
    if record.value is not None:
        try:
            found[record.key] = BuriedMessage.from_record(record)
        except MalformedMessage:
            return  # something that Charter did not write; it stays where it is
