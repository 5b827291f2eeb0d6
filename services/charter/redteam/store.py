"""The folder of a run: which prompts are done, and the rows as Parquet. The log is the truth.

    OUT/.run.json                     the run's name, what it was asked, and where the log stood when it began
    OUT/data/revisions-00000.parquet  rows, rendered from the log; written whole or not at all
    OUT/.lock                         held by the process that works here

A row is first published, which is atomic, and only then rendered. Every part says in its metadata up to which
positions of the log it and the parts before it go, so that after a crash at any instant reading on from there
finds exactly the rows that no part has. A prompt is done when its row is in a part or in the log behind the
parts; it is never asked again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from charter.bus import Bus, Record
from charter.bus.messages import decode, encode
from charter.errors import ConfigError, MalformedMessage
from charter.redteam.config import RedTeamConfig
from charter.redteam.records import TOPIC, Revision, table
from charter.v1 import events_pb2

_POSITIONS = b"charter.positions"
_KEPT = ("rounds", "temperature", "max_tokens", "seed")
"""What a run may not change between two starts: the rows of one data set are made alike."""
_BATCH = 200

Positions = dict[int, int]
"""Partition of the topic `revisions` to the offset of the next record to read."""


@dataclass(frozen=True, slots=True)
class _Run:
    name: str
    asked: dict[str, Any]
    start: Positions


class RunFolder:
    """A run's folder, while this process works in it. Opened by `with`; raises `ConfigError`."""

    def __init__(self, path: Path, bus: Bus, config: RedTeamConfig) -> None:
        self.path = path
        self._bus = bus
        self._config = config
        self._lock: IO[str] | None = None
        self._waiting: list[Revision] = []
        """Rows that are in the log and in no part yet."""
        self._uncertain = False
        """Whether a publish failed, which leaves open whether its rows are in the log."""

    def __enter__(self) -> Self:
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"{self.path}: another run works here; wait for it, or name another folder"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be used ({error.strerror}); name another folder"
            ) from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the folder go; safe to repeat."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def data(self) -> Path:
        """Where the Parquet files lie."""
        return self.path / "data"

    @property
    def done(self) -> frozenset[str]:
        """Ids of the prompts that have their row."""
        return frozenset(self._done)

    def revision_id(self, prompt_id: str) -> str:
        """The name of a prompt's row in this run."""
        return f"{self._run.name}/{prompt_id}"

    def publish(self, revisions: Sequence[Revision]) -> None:
        """Appends the rows to the log, all or none, and none twice.

        `BackendUnavailable` leaves open whether they were appended, so a retry first looks.
        """
        if self._uncertain:
            self._read_on()
        fresh = [r for r in revisions if r.prompt_id not in self._done]
        if not fresh:
            return
        self._uncertain = True
        lies = self._bus.publish([encode(TOPIC, r.prompt_id, r.to_proto()) for r in fresh])
        self._uncertain = False
        for revision, position in zip(fresh, lies, strict=True):
            self._take(revision)
            # Nobody else publishes rows of this run, so whatever lies before is not ours or is known.
            self._positions[position.partition] = position.offset + 1

    def render(self, finish: bool = False) -> None:
        """Writes the rows that no part has, when there are enough for one; all of them to `finish`."""
        if len(self._waiting) >= (1 if finish else self._config.rows_per_part):
            self._write_part(self._waiting, self._positions)
            self._waiting = []

    # The log -----------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        """Takes what lies in the log behind `_positions` into `_waiting` and `_done`."""
        for partition, bounds in self._bus.bounds(TOPIC).items():
            while self._positions.get(partition, 0) < bounds.end:
                records = self._bus.fetch(TOPIC, partition, self._positions.get(partition, 0), _BATCH, 1.0)
                if not records:  # on a broker, what is left is the mark of a transaction
                    break
                for record in records:
                    self._take(_ours(record, self._run.name))
                self._positions[partition] = records[-1].offset + 1
        self._uncertain = False

    def _take(self, revision: Revision | None) -> None:
        if revision is not None and revision.prompt_id not in self._done:
            self._done.add(revision.prompt_id)
            self._waiting.append(revision)

    # Files -------------------------------------------------------------------------------------------

    def _open(self) -> None:
        for left in self.data.glob(".*.tmp"):
            left.unlink()
        self._run = self._load_run() or self._new_run()
        self._parts = sorted(self.data.glob("revisions-*.parquet"))
        self._positions: Positions = dict(self._run.start)
        self._done: set[str] = set()
        for part in self._parts:
            done, positions = _read_part(part)
            self._done |= done
            self._positions = positions
        ends = self._bus.bounds(TOPIC)
        if any(p not in ends or offset > ends[p].end for p, offset in self._positions.items()):
            raise ConfigError(
                f"{self.path}: was made with another bus, whose log goes further than this one's; name that "
                "bus with --bus, or another folder with --out"
            )
        self._read_on()

    def _load_run(self) -> _Run | None:
        file = self.path / ".run.json"
        if not file.exists():
            if any(self.data.glob("*.parquet")):
                raise ConfigError(f"{self.data}: has Parquet files of something else; name another folder")
            return None
        try:
            record = json.loads(file.read_text())
            run = _Run(record["name"], record["asked"], {int(p): o for p, o in record["start"].items()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{file}: is damaged ({error}); name another folder") from error
        asked = {key: value for key, value in asdict(self._config).items() if key in _KEPT}
        for key, value in asked.items():
            if run.asked.get(key) != value:
                raise ConfigError(
                    f"{self.path}: was begun with {key} {run.asked.get(key)}, and now it is {value}; go on "
                    "with the first, or name another folder"
                )
        return run

    def _new_run(self) -> _Run:
        asked = {key: value for key, value in asdict(self._config).items() if key in _KEPT}
        start = {partition: bounds.end for partition, bounds in self._bus.bounds(TOPIC).items()}
        run = _Run(f"redteam-{uuid.uuid4().hex[:12]}", asked, start)
        text = json.dumps(asdict(run), indent=1)
        _write_whole(self.path / ".run.json", lambda file: file.write_text(text))
        return run

    def _write_part(self, rows: Sequence[Revision], positions: Positions) -> None:
        part = self.data / f"revisions-{len(self._parts):05d}.parquet"
        told = {_POSITIONS: json.dumps(positions).encode()}
        content = table(rows).replace_schema_metadata(told)
        _write_whole(part, lambda file: pq.write_table(content, file, compression="zstd"))
        self._parts.append(part)


def _ours(record: Record, run: str) -> Revision | None:
    """The row in a record of the topic; None for one of another run, or that cannot be understood."""
    with contextlib.suppress(MalformedMessage):  # another's: readers of the topic bury it
        event = decode(record, events_pb2.RevisionEvent)
        if event.revision_id.startswith(f"{run}/"):
            return Revision.from_proto(event)
    return None


def _read_part(part: Path) -> tuple[set[str], Positions]:
    try:
        content = pq.read_table(part, columns=["prompt_id"])
        positions = json.loads(content.schema.metadata[_POSITIONS])
        return set(content["prompt_id"].to_pylist()), {int(p): o for p, o in positions.items()}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ConfigError(
            f"{part}: is no part of a run ({error}); move it away, or name another folder"
        ) from error


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that it is there whole or not at all, also after a loss of power."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        write(draft)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); is the disk full?") from error
