"""Conversations that users gave for training, on their way to the bus, with personal data removed.

Off the hot path: an answer only puts its conversation into a bounded queue. What cannot be written after
several attempts is dropped and counted, and never written with its personal data.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from charter.bus.base import Outgoing
from charter.bus.messages import encode
from charter.errors import CharterError
from charter.gateway.metrics import GatewayMetrics
from charter.lm.base import Conversation, ModelVersion
from charter.rpc.convert import messages_to_proto, version_to_proto
from charter.telemetry.logs import get_logger
from charter.v1 import events_pb2

log = get_logger(__name__)

TOPIC = "conversations"
_BATCH = 64
_PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds between attempts to write a batch."""


class Publisher(Protocol):
    """The part of `charter.bus.Bus` that is needed here."""

    def publish(self, messages: Sequence[Outgoing]) -> object:
        """Appends all of the messages, or none."""
        ...


Redact = Callable[[str], tuple[str, Mapping[str, int]]]
"""Removes personal data from a text; says how much of each kind there was."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """A conversation that its user gave, ending with the answer that they saw."""

    conversation_id: str
    conversation: Conversation
    policy: ModelVersion
    constitution_digest: str
    principle_ids: tuple[str, ...]
    """Principles that changed the answer."""


class Contributions:
    """Writes contributions to the bus from a task of its own, until `stop`."""

    def __init__(
        self,
        bus: Publisher,
        redact: Redact,
        metrics: GatewayMetrics,
        limit: int,
        pauses: Sequence[float] = _PAUSES,
    ) -> None:
        self._bus = bus
        self._redact = redact
        self._metrics = metrics
        self._pauses = pauses
        self._limit = limit
        self._waiting: list[Contribution] = []
        self._came = asyncio.Event()
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    def offer(self, given: Sequence[Contribution]) -> bool:
        """Takes contributions to be written soon, or refuses them when too many wait; never blocks."""
        if self._stopping or len(self._waiting) + len(given) > self._limit:
            self._metrics.contributions.labels("full").inc(len(given))
            return False
        self._waiting.extend(given)
        self._came.set()
        return True

    async def stop(self, within_seconds: float) -> None:
        """Writes what waits, for at most this long; safe to repeat."""
        self._stopping = True
        self._came.set()
        await asyncio.wait({self._task}, timeout=within_seconds)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._waiting:
            self._drop(len(self._waiting), "the gateway stopped")
            self._waiting.clear()

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            while self._waiting:
                batch = self._waiting[:_BATCH]
                await self._write(batch)
                del self._waiting[: len(batch)]
            if self._stopping:
                return

    async def _write(self, batch: Sequence[Contribution]) -> None:
        for pause in (*self._pauses, None):
            try:
                await asyncio.to_thread(self._publish, batch)
            except CharterError as error:
                if pause is None:
                    self._drop(len(batch), str(error))
                else:
                    await asyncio.sleep(pause)
            except Exception as error:  # one bad conversation must not end the recording
                self._drop(len(batch), type(error).__name__)
                return
            else:
                self._metrics.contributions.labels("written").inc(len(batch))
                return

    def _drop(self, count: int, reason: str) -> None:
        self._metrics.contributions.labels("failed").inc(count)
        log.error("conversations not recorded", count=count, reason=reason)

    def _publish(self, batch: Sequence[Contribution]) -> None:
        now = int(time.time() * 1000)
        self._bus.publish([encode(TOPIC, c.conversation_id, to_proto(c, self._redact, now)) for c in batch])


def to_proto(
    contribution: Contribution, redact: Redact, created_unix_ms: int
) -> events_pb2.ConversationEvent:
    """The event, with personal data removed from every turn."""
    redactions: dict[str, int] = {}
    turns = []
    for message in contribution.conversation:
        text, found = redact(message.content)
        for kind, count in found.items():
            redactions[kind] = redactions.get(kind, 0) + count
        turns.append(replace(message, content=text))
    return events_pb2.ConversationEvent(
        conversation_id=contribution.conversation_id,
        conversation=messages_to_proto(turns),
        policy=version_to_proto(contribution.policy),
        constitution_digest=contribution.constitution_digest,
        principle_ids=contribution.principle_ids,
        created_unix_ms=created_unix_ms,
        redactions=redactions,
    )
