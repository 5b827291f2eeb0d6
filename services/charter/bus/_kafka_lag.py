"""How many records lie between a group's position and the end of a partition.

Offsets do not say it: the marker that ends a transaction takes one in every partition that it touched, so a
partition with one record a transaction looks twice as full as it is. Whoever waits for a number of records (a
sampler for the trainer, the trainer for its labels) would wait for ever by such a count. So a short backlog
is read, each record once, and remembered by offset; of a long one the offsets are an upper bound, which is
good enough to say that it is long.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from charter.bus.base import Partition, Record

COUNTED = 1000
"""Offsets beyond the known ones that are read to be counted; a backlog with more is not."""

Read = Callable[[Partition, int, int, int], list[Record]]
"""Records of a partition from an offset to an end, at most so many; empty when only holes are left."""


@dataclass(slots=True)
class Backlog:
    """What is known of one partition from a position on."""

    start: int = 0
    end: int = 0
    offsets: list[int] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)

    def count(self, place: Partition, position: int, end: int, read: Read) -> tuple[int, int | None]:
        """Records in [position, end), and the timestamp of the oldest; None when there are none."""
        if not self.start <= position <= self.end:
            self.start = self.end = position
            self.offsets.clear()
            self.times_ms.clear()
        self._forget_before(position)
        if end - self.end > COUNTED:
            oldest = self.times_ms[0] if self.times_ms else _time_of(read(place, position, end, 1))
            return (0, None) if oldest is None else (end - position, oldest)
        while self.end < end:
            records = read(place, self.end, end, COUNTED)
            self.offsets += [record.offset for record in records]
            self.times_ms += [record.timestamp_ms for record in records]
            self.end = records[-1].offset + 1 if records else end
        known = bisect_left(self.offsets, end)
        return known, self.times_ms[0] if known else None

    def _forget_before(self, position: int) -> None:
        gone = bisect_left(self.offsets, position)
        del self.offsets[:gone], self.times_ms[:gone]
        self.start = position


def _time_of(records: list[Record]) -> int | None:
    return records[0].timestamp_ms if records else None
