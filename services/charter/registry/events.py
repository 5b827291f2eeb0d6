"""Checkpoints on the bus: announcing what became of one, and asking how many updates are behind one."""

from __future__ import annotations

import threading
import time

from charter.bus import Bus, Outgoing
from charter.bus.messages import decode, encode
from charter.bus.topics import CHECKPOINTS
from charter.errors import MalformedMessage
from charter.registry.manifest import Manifest
from charter.registry.status import Change
from charter.v1 import events_pb2

_REFRESH_S = 1.0


def announcement(manifest: Manifest, root: str, change: Change) -> Outgoing:
    """The message that tells everybody about a change of status; the topic keeps the newest of each."""
    event = events_pb2.CheckpointEvent(
        checkpoint_id=manifest.id,
        uri=f"{root.rstrip('/')}/{manifest.id}",
        parent_id=manifest.facts.parent,
        step=manifest.facts.step,
        status=change.status,
        reason=change.reason,
        created_unix_ms=change.at_unix_ms,
    )
    return encode(CHECKPOINTS, manifest.id, event)


class Steps:
    """How many trainer updates are behind a policy version, from the `checkpoints` topic. Thread-safe."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._steps: dict[str, int] = {}
        self._next: dict[int, int] = {}
        self._missed_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def of(self, version: str) -> int:
        """The step of a checkpoint id; 0 for a model that no trainer announced, such as the seed."""
        with self._lock:
            if version not in self._steps and self._may_read(version):
                self._read_on()
                self._missed_at[version] = time.monotonic()
            return self._steps.get(version, 0)

    def _may_read(self, version: str) -> bool:
        """A version that is asked for the first time always is looked up; one that is not there, rarely."""
        return time.monotonic() - self._missed_at.get(version, float("-inf")) >= _REFRESH_S

    def _read_on(self) -> None:
        for partition, bounds in self._bus.bounds(CHECKPOINTS).items():
            start = max(self._next.get(partition, bounds.first), bounds.first)
            while start < bounds.end:
                records = self._bus.fetch(CHECKPOINTS, partition, start, max_records=500)
                if not records:
                    break  # compacted away
                for record in records:
                    start = record.offset + 1
                    try:
                        event = decode(record, events_pb2.CheckpointEvent)
                    except MalformedMessage:
                        continue  # a removed key, or for the group that reads the topic to bury
                    self._steps[event.checkpoint_id] = event.step
            self._next[partition] = bounds.end
