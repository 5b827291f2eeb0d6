"""The SQLite file under the embedded log: schema, transactions with bounded waits, messages.

One `Store` is one connection. Several stores, in one process or in several, may use one file at once;
SQLite's write-ahead log lets readers go on while one of them writes. All times are given by the caller.

What survives what:
- SIGKILL of any process, at any instant: everything that was acknowledged; the kernel has it already.
- Power loss, with `synchronous=full` (the default): the same; each commit waits for the disk.
- Power loss, with `synchronous=normal`: the file stays consistent but may go back by the last transactions,
  each whole, results and positions together. Offsets are then given out anew, so a checkpoint that recorded a
  position outside of the log may point behind its end. Choose it only where that can be lived with.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from charter.bus.base import (
    MAX_POLL_BYTES,
    Bounds,
    Cleanup,
    Outgoing,
    Partition,
    Position,
    Record,
    TopicSpec,
    partition_for,
)
from charter.errors import BackendUnavailable, BusError, ConfigError

Connection = sqlite3.Connection

SCHEMA_VERSION = 1

TOMBSTONE_MS = 24 * 3_600_000
"""How long a removed key's tombstone stays on a compacted topic (Kafka's default)."""

EXPIRE_BATCH = 5000
"""Offsets of one partition that one pass of retention removes, so that writers do not wait long."""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS topics (
  name TEXT PRIMARY KEY, partitions INTEGER NOT NULL, key_field TEXT NOT NULL, message TEXT NOT NULL,
  retention_ms INTEGER, cleanup TEXT NOT NULL, max_message_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS partitions (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, first INTEGER NOT NULL, end INTEGER NOT NULL,
  PRIMARY KEY (topic, partition)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
  key BLOB NOT NULL, value BLOB, headers TEXT NOT NULL, timestamp_ms INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS messages_by_offset ON messages (topic, partition, offset);
CREATE TABLE IF NOT EXISTS positions (
  grp TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
  PRIMARY KEY (grp, topic, partition)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS members (
  grp TEXT NOT NULL, member TEXT NOT NULL, session TEXT NOT NULL, topics TEXT NOT NULL,
  beat REAL NOT NULL, session_timeout REAL NOT NULL, PRIMARY KEY (grp, member)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (
  grp TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL,
  owner TEXT, target TEXT, epoch INTEGER NOT NULL, wanted_by REAL,
  PRIMARY KEY (grp, topic, partition)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""

_TOPIC_COLUMNS = "name, partitions, key_field, message, retention_ms, cleanup, max_message_bytes"
_RECORD_COLUMNS = "topic, partition, offset, key, value, headers, timestamp_ms"


class Store:
    """A connection to the file, one user at a time (`read` and `write` hold a lock)."""

    def __init__(self, path: Path, synchronous: str, lock_timeout_s: float) -> None:
        self.path = path
        self.lock_timeout_s = lock_timeout_s
        self._lock = threading.RLock()
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=lock_timeout_s, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{path}: the log cannot be opened ({error}); give a folder that can be written"
            ) from error
        with self._lock, self._translated():
            if self._version() == 0:  # heeded by a new file only; an old one would wait for the write lock
                self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {synchronous.upper()}")
            self._connection.execute("PRAGMA journal_size_limit = 67108864")
            self._migrate()

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _migrate(self) -> None:
        version = self._version()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{self.path}: written by a newer Charter (log format {version}, this one knows "
                f"{SCHEMA_VERSION}); upgrade, or use another file"
            )
        if version < SCHEMA_VERSION:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.strip().split(";\n"):
                self._connection.execute(statement)
            self._connection.execute("COMMIT")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes: all of the block, or nothing. Waits for other writers, boundedly."""
        with self._lock, self._translated():
            self._check_open()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction that reads: every statement of the block sees the log at one instant."""
        with self._lock, self._translated():
            self._check_open()
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.execute("COMMIT")

    def data_version(self) -> int:
        """A number that changes when another connection commits; cheap enough to watch."""
        with self._lock, self._translated():
            self._check_open()
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def expire(self, now_ms: int) -> int:
        """Removes what retention and compaction do not keep, and gives the space back."""
        with self.write() as db:
            removed = expire(db, read_topics(db).values(), now_ms)
        if removed:
            with self._lock, self._translated():
                self._connection.execute("PRAGMA incremental_vacuum(2000)").fetchall()
        return removed

    def close(self) -> None:
        """Closes the connection; safe to repeat."""
        with self._lock:
            self._closed = True
            self._connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(f"{self.path}: the log is closed; open it again with open_bus")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as ours, saying what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise BackendUnavailable(
                    f"{self.path}: the log's write lock was not free for {self.lock_timeout_s:g} s; "
                    "a stopped process may be holding it"
                ) from error
            if name == "SQLITE_FULL":
                raise BackendUnavailable(
                    f"{self.path}: the disk is full; free space, and work goes on"
                ) from error
            raise BusError(f"{self.path}: {error} ({name})") from error
        except sqlite3.DatabaseError as error:
            raise BusError(
                f"{self.path}: not a log of Charter, or damaged ({error}); move it away"
            ) from error


def read_topics(db: sqlite3.Connection) -> dict[str, TopicSpec]:
    """The topics that exist."""
    rows = db.execute(
        f"SELECT {_TOPIC_COLUMNS} FROM topics ORDER BY name"  # noqa: S608
    )
    return {r[0]: TopicSpec(r[0], r[1], r[2], r[3], r[4], Cleanup(r[5]), r[6]) for r in rows}


def write_topic(db: sqlite3.Connection, spec: TopicSpec) -> None:
    """Creates a topic, or brings it to `spec`; partitions are only ever added."""
    db.execute(
        f"INSERT OR REPLACE INTO topics ({_TOPIC_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        (
            spec.name,
            spec.partitions,
            spec.key,
            spec.message,
            spec.retention_ms,
            spec.cleanup.value,
            spec.max_message_bytes,
        ),
    )
    db.executemany(
        "INSERT OR IGNORE INTO partitions (topic, partition, first, end) VALUES (?, ?, 0, 0)",
        [(spec.name, p) for p in range(spec.partitions)],
    )


def append(db: sqlite3.Connection, messages: Sequence[Outgoing], now_ms: int) -> tuple[Position, ...]:
    """Appends messages within the caller's transaction. Raises `BusError` before anything is visible."""
    specs: dict[str, TopicSpec] = read_topics(db)
    ends: dict[tuple[str, int], int] = {}
    rows: list[tuple[Any, ...]] = []
    for message in messages:
        spec = specs.get(message.topic)
        if spec is None:
            raise BusError(f"topic {message.topic!r} does not exist; create it with `charter topics apply`")
        size = len(message.key) + len(message.value or b"")
        if size > spec.max_message_bytes:
            raise BusError(
                f"a message of {size} bytes is over the {spec.max_message_bytes} of topic {spec.name!r}; "
                "split it, or raise max_message_bytes in topics.yaml"
            )
        place = (message.topic, partition_for(message.key, spec.partitions))
        if place not in ends:
            ends[place] = db.execute(
                "SELECT end FROM partitions WHERE topic = ? AND partition = ?", place
            ).fetchone()[0]
        rows.append((*place, ends[place], message.key, message.value, _pack_headers(message), now_ms))
        ends[place] += 1
    db.executemany(f"INSERT INTO messages ({_RECORD_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)  # noqa: S608
    db.executemany(
        "UPDATE partitions SET end = ? WHERE topic = ? AND partition = ?",
        [(end, *place) for place, end in ends.items()],
    )
    return tuple(Position(row[0], row[1], row[2]) for row in rows)


def read_records(
    db: sqlite3.Connection, place: Partition, offset: int, limit: int, max_bytes: int = MAX_POLL_BYTES
) -> list[Record]:
    """Records from `offset` on, at most `limit`, and no more after `max_bytes`."""
    cursor = db.execute(
        f"SELECT {_RECORD_COLUMNS} FROM messages WHERE topic = ? AND partition = ? AND offset >= ?"  # noqa: S608
        " ORDER BY offset LIMIT ?",
        (*place, offset, limit),
    )
    records: list[Record] = []
    size = 0
    for row in cursor:
        record = Record(row[0], row[1], row[2], row[3], row[4], _unpack_headers(row[5]), row[6])
        records.append(record)
        size += len(record.key) + len(record.value or b"")
        if size >= max_bytes:
            break
    cursor.close()
    return records


def read_bounds(db: sqlite3.Connection, topic: str) -> dict[int, Bounds]:
    """Oldest and next offset of each partition. Raises `BusError` for an unknown topic."""
    rows = db.execute(
        "SELECT partition, first, end FROM partitions WHERE topic = ? ORDER BY partition", (topic,)
    )
    bounds = {row[0]: Bounds(row[1], row[2]) for row in rows}
    if not bounds:
        raise BusError(f"topic {topic!r} does not exist; create it with `charter topics apply`")
    return bounds


def read_timestamp(db: sqlite3.Connection, topic: str, partition: int, offset: int) -> int | None:
    """Timestamp of the first record from `offset` on."""
    row = db.execute(
        "SELECT timestamp_ms FROM messages WHERE topic = ? AND partition = ? AND offset >= ?"
        " ORDER BY offset LIMIT 1",
        (topic, partition, offset),
    ).fetchone()
    return None if row is None else int(row[0])


def expire(db: sqlite3.Connection, specs: Iterable[TopicSpec], now_ms: int) -> int:
    """Removes what the topics' retention or compaction does not keep; says how many records went."""
    removed = 0
    for spec in specs:
        if spec.cleanup is Cleanup.COMPACT:
            removed += _compact(db, spec.name, now_ms - TOMBSTONE_MS)
        elif spec.retention_ms is not None:
            removed += _expire_old(db, spec.name, now_ms - spec.retention_ms)
    return removed


def _compact(db: sqlite3.Connection, topic: str, tombstones_before_ms: int) -> int:
    """Keeps the newest record of each key; a tombstone stays long enough for every reader to see it."""
    newest = "SELECT MAX(rowid) FROM messages WHERE topic = ? GROUP BY partition, key"
    older = f"DELETE FROM messages WHERE topic = ? AND rowid NOT IN ({newest})"  # noqa: S608
    tombstones = "DELETE FROM messages WHERE topic = ? AND value IS NULL AND timestamp_ms < ?"
    removed = db.execute(older, (topic, topic)).rowcount
    return removed + db.execute(tombstones, (topic, tombstones_before_ms)).rowcount


def _expire_old(db: sqlite3.Connection, topic: str, before_ms: int) -> int:
    """Removes the head of each partition up to the first record that is young enough."""
    removed = 0
    for partition, bounds in read_bounds(db, topic).items():
        row = db.execute(
            "SELECT MIN(offset) FROM messages WHERE topic = ? AND partition = ? AND timestamp_ms >= ?",
            (topic, partition, before_ms),
        ).fetchone()
        young = bounds.end if row[0] is None else row[0]
        first = min(young, bounds.first + EXPIRE_BATCH)
        if first > bounds.first:
            removed += db.execute(
                "DELETE FROM messages WHERE topic = ? AND partition = ? AND offset < ?",
                (topic, partition, first),
            ).rowcount
            db.execute(
                "UPDATE partitions SET first = ? WHERE topic = ? AND partition = ?", (first, topic, partition)
            )
    return removed


def _pack_headers(message: Outgoing) -> str:
    return json.dumps({k: v.hex() for k, v in message.headers.items()}) if message.headers else ""


def _unpack_headers(text: str) -> dict[str, bytes]:
    return {k: bytes.fromhex(v) for k, v in json.loads(text).items()} if text else {}
