"""The labels that the service has seen, in one SQLite file, numbered in the order of arrival.

A label is stored once, whatever the bus delivers again after a crash: its preference_id is unique. The
learner, another process, reads the same file.
"""

from __future__ import annotations

import sqlite3
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from charter.errors import BackendUnavailable, CheckpointError
from charter.reward.pairs import Pair

_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
  number INTEGER PRIMARY KEY,
  preference_id TEXT NOT NULL UNIQUE,
  prompt_id TEXT NOT NULL,
  prompt BLOB NOT NULL,
  answer_a BLOB NOT NULL,
  answer_b BLOB NOT NULL,
  probability REAL NOT NULL,
  human INTEGER NOT NULL,
  constitution TEXT NOT NULL,
  judge TEXT NOT NULL,
  principles TEXT NOT NULL,
  heldout INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_split ON labels (heldout, number);
"""
_FIELDS = (
    "preference_id, prompt_id, prompt, answer_a, answer_b, probability, human, "
    "constitution, judge, principles"
)


class LabelStore:
    """Labels on disk. Thread-safe; one process writes, others may read."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                file, check_same_thread=False, isolation_level=None, timeout=30
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise CheckpointError(
                f"{file} cannot be used ({error}); free the disk, or move the file away"
            ) from error

    def add(self, pair: Pair, heldout: bool) -> bool:
        """Stores a label unless it is there; says whether it was new. It is on the disk when this returns.

        Raises `BackendUnavailable` when the disk refuses.
        """
        row = (
            pair.preference_id,
            pair.prompt_id,
            _packed(pair.prompt_ids),
            _packed(pair.answer_a),
            _packed(pair.answer_b),
            pair.probability,
            int(pair.human),
            pair.constitution_digest,
            pair.judge_digest,
            "\n".join(pair.principles),
            int(heldout),
        )
        query = f"INSERT OR IGNORE INTO labels ({_FIELDS}, heldout) VALUES (?,?,?,?,?,?,?,?,?,?,?)"  # noqa: S608
        try:
            with self._lock:
                return self._connection.execute(query, row).rowcount == 1
        except sqlite3.Error as error:
            raise BackendUnavailable(
                f"label {pair.preference_id} cannot be stored ({error}); make room on the disk; labels wait "
                "on the bus meanwhile"
            ) from error

    def count(self, heldout: bool | None = None) -> int:
        """Labels in all, or of one split."""
        where = "" if heldout is None else f" WHERE heldout = {int(heldout)}"
        with self._lock:
            return int(self._connection.execute(f"SELECT count(*) FROM labels{where}").fetchone()[0])  # noqa: S608

    def heldout_among(self, upto: int) -> int:
        """Held-out labels among the first `upto`."""
        with self._lock:
            query = "SELECT count(*) FROM labels WHERE heldout = 1 AND number <= ?"
            return int(self._connection.execute(query, (upto,)).fetchone()[0])

    def numbers(self, heldout: bool, upto: int) -> list[int]:
        """Numbers of a split among the first `upto` labels, ascending."""
        with self._lock:
            query = "SELECT number FROM labels WHERE heldout = ? AND number <= ? ORDER BY number"
            return [n for (n,) in self._connection.execute(query, (int(heldout), upto))]

    def read(self, numbers: Sequence[int]) -> list[Pair]:
        """The labels with these numbers, in this order."""
        query = f"SELECT {_FIELDS} FROM labels WHERE number = ?"  # noqa: S608
        with self._lock:
            return [_pair(self._connection.execute(query, (n,)).fetchone()) for n in numbers]

    def close(self) -> None:
        """Closes the file; safe to repeat."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _unpacked(data: bytes) -> tuple[int, ...]:
    return tuple(array("i", data))


def _pair(row: tuple[str, str, bytes, bytes, bytes, float, int, str, str, str]) -> Pair:
    preference, prompt, ids, a, b, probability, human, constitution, judge, principles = row
    return Pair(
        preference_id=preference,
        prompt_id=prompt,
        prompt_ids=_unpacked(ids),
        answer_a=_unpacked(a),
        answer_b=_unpacked(b),
        probability=probability,
        human=bool(human),
        constitution_digest=constitution,
        judge_digest=judge,
        principles=tuple(principles.split("\n")) if principles else (),
    )
