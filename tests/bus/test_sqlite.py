"""What only the embedded log promises: how processes that share its file stand in each other's way."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from charter.bus import Outgoing, TopicSpec
from charter.bus.sqlite import SqliteBus, SqliteOptions
from charter.errors import BackendUnavailable

IMPATIENT = SqliteOptions(lock_timeout_s=0.2)


@contextmanager
def writer(path: Path) -> Iterator[None]:
    """Somebody who holds the write lock, as a process does that was stopped within a write."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "bus.db"
    with SqliteBus(path) as bus:
        bus.apply_topics([TopicSpec("t", 1)])
        bus.publish([Outgoing("t", b"k", b"v")])
    return path


def test_a_log_opens_and_reads_while_another_writes(path: Path) -> None:
    with writer(path), SqliteBus(path, IMPATIENT) as bus:
        assert [record.value for record in bus.fetch("t", 0, 0, 10)] == [b"v"]


def test_a_write_lock_that_is_not_given_back_is_named(path: Path) -> None:
    with SqliteBus(path, IMPATIENT) as bus:
        with writer(path), pytest.raises(BackendUnavailable, match="a stopped process may be holding it"):
            bus.publish([Outgoing("t", b"k", b"w")])
        bus.publish([Outgoing("t", b"k", b"w")])
