"""The embedded log: one SQLite file, several processes, the same promises as the broker.

    sqlite:<file>[?synchronous=full|normal][&lock_timeout=<seconds>]

`charter.bus._store` says what a crash and a power loss may do, `charter.bus._groups` how groups work. A
thread of each bus gives its consumers' signs of life and enforces retention.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from charter.bus import _groups, _store
from charter.bus.base import (
    MAX_POLL_BYTES,
    Bounds,
    ConsumerOptions,
    DeadLetter,
    Lag,
    Outgoing,
    Partition,
    Position,
    Record,
    TopicChange,
    TopicSpec,
    end_positions,
    is_for,
)
from charter.bus.messages import encode_dead_letter
from charter.bus.topics import load_topics, plan_topics
from charter.errors import BackendUnavailable, BusError, ConfigError, Fenced
from charter.telemetry.logs import get_logger

_log = get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SqliteOptions:
    """How the embedded log behaves."""

    synchronous: str = "full"
    """`full`: an acknowledged message survives power loss. `normal`: faster; see `charter.bus._store`."""
    lock_timeout_s: float = 30.0
    """How long an operation waits for another process that writes, before `BackendUnavailable`."""
    housekeeping_s: float = 60.0
    """Seconds between two passes of retention and compaction."""

    def __post_init__(self) -> None:
        if self.synchronous not in ("full", "normal"):
            raise ConfigError(f"synchronous must be full or normal, not {self.synchronous!r}")
        if self.lock_timeout_s <= 0 or self.housekeeping_s <= 0:
            raise ConfigError("lock_timeout and housekeeping must be more than 0 seconds")


@dataclass(slots=True)
class _Progress:
    """Where a consumer stands in one partition that it owns."""

    epoch: int
    committed: int
    next: int

    @property
    def in_hand(self) -> bool:
        """Whether records were taken and not committed yet."""
        return self.next != self.committed


class SqliteBus:
    """A `charter.bus.base.Bus` in one file."""

    def __init__(
        self,
        path: Path,
        options: SqliteOptions | None = None,
        topics: Sequence[TopicSpec] | None = None,
    ) -> None:
        """Opens or creates the log, and creates what is missing of `topics` (default: topics.yaml)."""
        self.path = path
        self.options = options or SqliteOptions()
        self._store = self._open_store()
        self._heart: _Heart | None = None
        self._consumers: list[SqliteConsumer] = []
        self._lock = threading.Lock()
        try:
            self._create_missing(load_topics() if topics is None else topics)
        except BaseException:
            self._store.close()
            raise

    def _open_store(self, synchronous: str | None = None) -> _store.Store:
        return _store.Store(self.path, synchronous or self.options.synchronous, self.options.lock_timeout_s)

    def _create_missing(self, specs: Sequence[TopicSpec]) -> None:
        existing = self.topics()
        if any(spec.name not in existing for spec in specs):
            self.apply_topics([spec for spec in specs if spec.name not in existing])

    def publish(self, messages: Sequence[Outgoing]) -> tuple[Position, ...]:
        """See `Bus.publish`."""
        with self._store.write() as db:
            positions = _store.append(db, messages, _now_ms())
        self._beating()
        return positions

    def consumer(
        self,
        group: str,
        topics: Sequence[str],
        member: str | None = None,
        options: ConsumerOptions | None = None,
    ) -> SqliteConsumer:
        """See `Bus.consumer`."""
        identity = _groups.Member(group, member or f"member-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex)
        consumer = SqliteConsumer(
            self, self._open_store(), identity, tuple(topics), options or ConsumerOptions()
        )
        with self._lock:
            self._consumers.append(consumer)
        self._beating().wake()
        return consumer

    def fetch(
        self, topic: str, partition: int, offset: int, max_records: int = 100, timeout: float = 0.0
    ) -> list[Record]:
        """See `Bus.fetch`."""

        def attempt() -> list[Record]:
            with self._store.read() as db:
                if partition not in _store.read_bounds(db, topic):
                    raise BusError(f"topic {topic!r} has no partition {partition}")
                return _store.read_records(db, Partition(topic, partition), offset, max_records)

        return _wait_for(attempt, self._store, timeout)

    def bounds(self, topic: str) -> dict[int, Bounds]:
        """See `Bus.bounds`."""
        with self._store.read() as db:
            return _store.read_bounds(db, topic)

    def positions(self, group: str) -> dict[Partition, int]:
        """See `Bus.positions`."""
        with self._store.read() as db:
            return _groups.read_positions(db, group)

    def lag(self, group: str, topics: Sequence[str]) -> list[Lag]:
        """See `Bus.lag`."""
        lags = []
        with self._store.read() as db:
            positions = _groups.read_positions(db, group)
            for topic in topics:
                for partition, bounds in _store.read_bounds(db, topic).items():
                    position = max(positions.get(Partition(topic, partition), 0), bounds.first)
                    oldest = _store.read_timestamp(db, topic, partition, position)
                    records = bounds.end - position
                    lags.append(Lag(group, topic, partition, position, bounds.end, records, oldest))
        return lags

    def plan_topics(self, specs: Sequence[TopicSpec]) -> list[TopicChange]:
        """See `Bus.plan_topics`."""
        return plan_topics(self.topics(), specs)

    def apply_topics(self, specs: Sequence[TopicSpec]) -> list[TopicChange]:
        """See `Bus.apply_topics`."""
        with self._store.write() as db:
            changes = plan_topics(_store.read_topics(db), specs)
            refused = {change.topic for change in changes if change.action == "refuse"}
            changed = {change.topic for change in changes} - refused
            for spec in specs:
                if spec.name in changed:
                    _store.write_topic(db, spec)
                    _groups.topic_changed(db, spec.name, time.monotonic())
        return changes

    def topics(self) -> dict[str, TopicSpec]:
        """See `Bus.topics`."""
        with self._store.read() as db:
            return _store.read_topics(db)

    def enforce_retention(self) -> int:
        """Removes what retention and compaction do not keep, now; says how many records went."""
        return self._store.expire(_now_ms())

    def consumers(self) -> list[SqliteConsumer]:
        """The open consumers of this bus."""
        with self._lock:
            return list(self._consumers)

    def forget(self, consumer: SqliteConsumer) -> None:
        """Called by a consumer that closes."""
        with self._lock:
            if consumer in self._consumers:
                self._consumers.remove(consumer)

    def close(self) -> None:
        """See `Bus.close`."""
        for consumer in self.consumers():
            consumer.close()
        with self._lock:
            heart, self._heart = self._heart, None
        if heart is not None:
            heart.stop()
        self._store.close()

    def _beating(self) -> _Heart:
        """The thread of this bus, started at the first use."""
        with self._lock:
            if self._heart is None:
                # Signs of life need not survive power loss, and a process that is stopped while it waits for
                # the disk would hold the write lock.
                self._heart = _Heart(self, self._open_store("normal"))
                self._heart.start()
            return self._heart

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SqliteConsumer:
    """A `charter.bus.base.Consumer` of the embedded log."""

    def __init__(
        self,
        bus: SqliteBus,
        store: _store.Store,
        identity: _groups.Member,
        topics: tuple[str, ...],
        options: ConsumerOptions,
    ) -> None:
        """Joins the group. Made by `SqliteBus.consumer`."""
        self.group = identity.group
        self.member = identity.name
        self.identity = identity
        self.options = options
        self._bus = bus
        self._store = store
        self._topics = topics
        self._progress: dict[Partition, _Progress] = {}
        self._turn = 0
        self._lock = threading.RLock()
        self._closed = False
        try:
            self._join()
        except BaseException:
            store.close()
            raise

    def poll(self, max_records: int = 100, timeout: float = 1.0) -> list[Record]:
        """See `Consumer.poll`."""

        def attempt() -> list[Record]:
            with self._lock:
                self._check_open()
                self._refresh()
                return self._take(max_records)

        return _wait_for(attempt, self._store, timeout)

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
            self._check_open()
            epochs = {place: progress.epoch for place, progress in self._progress.items()}
            try:
                with self._store.write() as db:
                    _groups.move_positions(db, self.identity, epochs, ends)
                    _store.append(db, messages, _now_ms())
            except Fenced:
                self.rewind()
                raise
            for place, end in ends.items():
                progress = self._progress[place]
                progress.committed = end
                progress.next = max(progress.next, end)

    def dead_letter(self, record: Record, error: str, attempts: int) -> None:
        """See `Consumer.dead_letter`."""
        self.commit([record], dead_letters=[DeadLetter(record, error, attempts)])

    def rewind(self) -> None:
        """See `Consumer.rewind`."""
        with self._lock:
            for progress in self._progress.values():
                progress.next = progress.committed

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """See `Consumer.seek`."""
        with self._lock:
            progress = self._progress.get(Partition(topic, partition))
            if progress is None:
                raise BusError(
                    f"group {self.group!r}: {topic}/{partition} is not owned by {self.member!r}; poll first"
                )
            progress.next = offset

    def assignment(self) -> frozenset[Partition]:
        """See `Consumer.assignment`."""
        with self._lock:
            return frozenset(self._progress)

    def close(self) -> None:
        """See `Consumer.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._bus.forget(self)
            try:
                with self._store.write() as db:
                    _groups.leave(db, self.identity, self.options, time.monotonic())
            except BackendUnavailable:
                _log.warning(
                    "could not leave; the session will run out", group=self.group, member=self.member
                )
            finally:
                self._store.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(f"group {self.group!r}: consumer {self.member!r} is closed; make another")

    def _join(self) -> None:
        with self._store.write() as db:
            _groups.join(db, self.identity, self._topics, self.options, time.monotonic())

    def _refresh(self) -> None:
        """Brings what this member believes to own to what it owns, and gives up what others should have."""
        with self._store.read() as db:
            alive = _groups.is_member(db, self.identity)
        if not alive:  # given up while this process was stopped or cut off: start anew
            self._progress.clear()
            self._join()
        with self._store.read() as db:
            claims = _groups.owned(db, self.identity)
            self._adopt(db, claims)
        surrendered = [p for p, claim in claims.items() if claim.wanted and not self._progress[p].in_hand]
        if surrendered:
            with self._store.write() as db:
                _groups.hand_over(db, self.identity, surrendered)
            for place in surrendered:
                del self._progress[place]

    def _adopt(self, db: _store.Connection, claims: dict[Partition, _groups.Claim]) -> None:
        for place in self._progress.keys() - claims.keys():
            del self._progress[place]
        fresh = [
            p for p, c in claims.items() if p not in self._progress or self._progress[p].epoch != c.epoch
        ]
        positions = _groups.read_positions(db, self.group) if fresh else {}
        bounds = {topic: _store.read_bounds(db, topic) for topic in {place.topic for place in claims}}
        for place in fresh:
            edge = bounds[place.topic][place.partition]
            start = positions.get(place, edge.end if self.options.from_end else edge.first)
            self._progress[place] = _Progress(claims[place].epoch, start, start)
        for place, progress in self._progress.items():
            first = bounds[place.topic][place.partition].first
            if progress.next < first:
                _log.warning(
                    "messages expired before they were read",
                    group=self.group,
                    topic=place.topic,
                    partition=place.partition,
                    lost=first - progress.next,
                )
                progress.committed = progress.next = first

    def _take(self, max_records: int) -> list[Record]:
        """The next records, a different partition first each time so that none starves."""
        places = sorted(self._progress)
        if not places:
            return []
        self._turn = (self._turn + 1) % len(places)
        taken: list[Record] = []
        size = 0
        with self._store.read() as db:
            for place in places[self._turn :] + places[: self._turn]:
                if len(taken) >= max_records or size >= MAX_POLL_BYTES:
                    break
                progress = self._progress[place]
                found = _store.read_records(
                    db, place, progress.next, max_records - len(taken), MAX_POLL_BYTES - size
                )
                if not found:
                    continue
                mine = [record for record in found if is_for(record, self.group)]
                was_in_hand = progress.in_hand
                progress.next = found[-1].offset + 1
                if not mine and not was_in_hand:
                    progress.committed = progress.next
                taken += mine
                size += sum(len(record.value or b"") for record in mine)
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Heart(threading.Thread):
    """Gives the signs of life of a bus's consumers, notices the dead of their groups, enforces retention."""

    def __init__(self, bus: SqliteBus, store: _store.Store) -> None:
        super().__init__(name=f"charter-bus-{bus.path.name}", daemon=True)
        self._bus = bus
        self._store = store
        self._stopping = False
        self._woken = threading.Event()

    def run(self) -> None:
        """Beats until `stop`."""
        next_housekeeping = time.monotonic() + self._bus.options.housekeeping_s
        while not self._stopping:
            consumers = self._bus.consumers()
            try:
                for consumer in consumers:
                    self._beat(consumer)
                if time.monotonic() >= next_housekeeping:
                    next_housekeeping = time.monotonic() + self._bus.options.housekeeping_s
                    self._store.expire(_now_ms())
            except BackendUnavailable as error:
                _log.warning("the log is unavailable", error=str(error))
            except BusError:
                if not self._stopping:
                    _log.exception("the log's housekeeping failed and goes on")
            pause = min(
                [c.options.session_timeout_s / 3 for c in consumers] + [self._bus.options.housekeeping_s]
            )
            self._woken.wait(pause)
            self._woken.clear()

    def _beat(self, consumer: SqliteConsumer) -> None:
        with self._store.write() as db:
            now = time.monotonic()
            _groups.beat(db, consumer.identity, now)
            _groups.expire(db, consumer.group, consumer.options, now)

    def wake(self) -> None:
        """Makes the next beat happen now."""
        self._woken.set()

    def stop(self) -> None:
        """Ends the thread and its connection."""
        self._stopping = True
        self._woken.set()
        self.join()
        self._store.close()


def _wait_for(attempt: Callable[[], list[_T]], store: _store.Store, timeout: float) -> list[_T]:
    """Tries again whenever another connection has written, until there is something or the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        version = store.data_version()
        found = attempt()
        if found:
            return found
        pause = 0.001
        while store.data_version() == version:
            left = deadline - time.monotonic()
            if left <= 0:
                return found
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.02)
        if time.monotonic() >= deadline:
            return found


def _now_ms() -> int:
    return int(time.time() * 1000)
