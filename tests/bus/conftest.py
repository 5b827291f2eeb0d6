"""The logs of the conformance suite: the embedded one always, a real broker under `make test-kafka`."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.kafka import support

from charter.bus import Bus, Cleanup, ConsumerOptions, TopicSpec, open_bus
from charter.bus.sqlite import SqliteBus, SqliteOptions

KAFKA = os.environ.get("CHARTER_TEST_KAFKA") == "1"
CHILD = [sys.executable, str(Path(__file__).with_name("child.py"))]


@dataclass
class Log:
    """One log that several buses and processes may open, with topics of its own for each test."""

    kind: str
    uri: str
    quick: ConsumerOptions = field(default_factory=lambda: ConsumerOptions(session_timeout_s=3.0))
    """The shortest session that the log allows."""
    opened: list[Bus] = field(default_factory=list)

    def open(self) -> Bus:
        bus = (
            SqliteBus(Path(self.uri.removeprefix("sqlite:")), SqliteOptions(housekeeping_s=0.2))
            if self.kind == "sqlite"
            else open_bus(self.uri)
        )
        self.opened.append(bus)
        return bus

    def topic(
        self,
        partitions: int = 1,
        retention_ms: int | None = None,
        cleanup: Cleanup = Cleanup.DELETE,
        max_message_bytes: int = 16 * 1024 * 1024,
    ) -> str:
        name = f"t-{uuid.uuid4().hex[:12]}"
        spec = TopicSpec(
            name, partitions, retention_ms=retention_ms, cleanup=cleanup, max_message_bytes=max_message_bytes
        )
        with open_bus(self.uri) as bus:
            bus.apply_topics([spec])
        return name

    def group(self) -> str:
        return f"g-{uuid.uuid4().hex[:12]}"

    def child(self, *arguments: object) -> Sequence[str]:
        """The command line of a process that uses this log (see child.py)."""
        return [*CHILD, self.uri, *(str(argument) for argument in arguments)]

    def stop(self, process: subprocess.Popen[str]) -> None:
        """SIGSTOP, between two writes: who is stopped within one keeps the embedded log's lock with it."""
        while True:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if self.kind != "sqlite" or self._can_be_written():
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)

    def _can_be_written(self) -> bool:
        path = self.uri.removeprefix("sqlite:")
        with closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_BUSY":
                    raise
                return False
            connection.execute("ROLLBACK")
        return True


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)] if KAFKA else ["sqlite"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    if request.param == "kafka":
        made = Log("kafka", request.getfixturevalue("kafka_uri"), ConsumerOptions(session_timeout_s=6.0))
    else:
        made = Log("sqlite", f"sqlite:{tmp_path / 'bus.db'}")
    yield made
    for bus in made.opened:
        bus.close()


@pytest.fixture
def bus(log: Log) -> Bus:
    return log.open()


@pytest.fixture(scope="session")
def kafka_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with support.kafka_uri(tmp_path_factory.mktemp("kafka")) as uri:
        yield uri
