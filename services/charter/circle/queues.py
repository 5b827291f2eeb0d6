"""How full the queues are and how fast they move, and when the engines have work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from charter.bus import Bus
from charter.bus.topics import PREFERENCES, PROMPTS, ROLLOUTS
from charter.circle.news import Kind, News, Tell
from charter.errors import BackendUnavailable
from charter.judge.worker import GROUP as JUDGE
from charter.sampler.worker import GROUP as SAMPLER
from charter.trainer.labels import GROUP as TRAINER

QUEUES = ((PROMPTS, SAMPLER), (ROLLOUTS, JUDGE), (PREFERENCES, TRAINER))
_EVERY_S = 2.0
_GLANCE_S = 0.05


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


async def watch_engines(busy: Mapping[str, Callable[[], bool]], tell: Tell) -> None:
    """Tells each stretch of time in which an engine had work, to a twentieth of a second."""
    since: dict[str, float] = {}
    while True:
        now = time.time()
        for who, is_busy in busy.items():
            if is_busy():
                since.setdefault(who, now)
            elif who in since:
                tell(News(Kind.BUSY, {"who": who, "begin": since.pop(who), "end": now}))
        await asyncio.sleep(_GLANCE_S)


def _look(bus: Bus) -> dict[str, tuple[int, int]]:
    """Topic: records that wait for the group that reads it, and how many there ever were."""
    return {
        topic: (
            sum(lag.records for lag in bus.lag(group, [topic])),
            sum(bounds.end for bounds in bus.bounds(topic).values()),
        )
        for topic, group in QUEUES
    }
