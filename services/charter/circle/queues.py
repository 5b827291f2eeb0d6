"""How full the queues are, and how fast they move."""

from __future__ import annotations

import asyncio
import time

from charter.bus import Bus
from charter.bus.topics import PREFERENCES, PROMPTS, ROLLOUTS
from charter.circle.news import Kind, News, Tell
from charter.errors import BackendUnavailable
from charter.judge.worker import GROUP as JUDGE
from charter.sampler.worker import GROUP as SAMPLER
from charter.trainer.labels import GROUP as TRAINER

QUEUES = ((PROMPTS, SAMPLER), (ROLLOUTS, JUDGE), (PREFERENCES, TRAINER))
_EVERY_S = 2.0


async def watch_queues(bus: Bus, tell: Tell) -> None:
    """Tells it every two seconds, until it is cancelled."""
    ends: dict[str, int] = {}
    before = time.monotonic()
    while True:
        try:
            found = await asyncio.to_thread(_look, bus)
        except BackendUnavailable:
            found = {}
        now = time.monotonic()
        values = {
            topic: {"waiting": waiting, "rate": (end - ends.get(topic, end)) / max(now - before, 1e-3)}
            for topic, (waiting, end) in found.items()
        }
        ends, before = {topic: end for topic, (_, end) in found.items()}, now
        tell(News(Kind.QUEUES, values))
        await asyncio.sleep(_EVERY_S)


def _look(bus: Bus) -> dict[str, tuple[int, int]]:
    """Topic: records that wait for the group that reads it, and how many there ever were."""
    return {
        topic: (
            sum(lag.records for lag in bus.lag(group, [topic])),
            sum(bounds.end for bounds in bus.bounds(topic).values()),
        )
        for topic, group in QUEUES
    }
