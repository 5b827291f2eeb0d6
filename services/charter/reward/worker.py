"""Takes labels from the topic `preferences` into the store, each once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from charter.bus import Bus, Outgoing, Record, is_for
from charter.bus.messages import decode
from charter.bus.metrics import BusMetrics
from charter.bus.worker import Worker, WorkerOptions
from charter.errors import CharterError
from charter.reward.metrics import RewardMetrics
from charter.reward.pairs import TooLongError, from_proto
from charter.reward.service import RewardModel
from charter.telemetry.logs import get_logger
from charter.v1 import events_pb2

log = get_logger(__name__)

TOPIC = "preferences"
_BATCH = 500


class LabelWorker:
    """Stores labels in the order of the log.

    The position on the bus moves after a label is stored, and a label is stored once, so a kill at any
    instant loses none and doubles none.
    """

    def __init__(
        self, bus: Bus, group: str, model: RewardModel, metrics: RewardMetrics, of_bus: BusMetrics
    ) -> None:
        self._bus = bus
        self._group = group
        self._model = model
        self._metrics = metrics
        options = WorkerOptions(max_records=64, poll_timeout_s=0.2)
        # The folder belongs to one process at a time. So does a member's name, by which a service that was
        # killed takes its place back at once.
        self._worker = Worker(
            bus, group, [TOPIC], self._handle, member=f"{group}-0", options=options, metrics=of_bus
        )

    async def run(self) -> None:
        """Works until `stop`."""
        await asyncio.to_thread(self._catch_up)
        self._model.labels_arrived()
        await self._worker.run()

    def stop(self) -> None:
        """`run` returns soon; safe to repeat."""
        self._worker.stop()

    async def _handle(self, record: Record) -> Sequence[Outgoing]:
        if self._store(record):
            self._model.labels_arrived()
        return ()

    def _store(self, record: Record) -> bool:
        event = decode(record, events_pb2.PreferenceEvent)
        try:
            pair = from_proto(event, self._model.vocabulary)
        except TooLongError as error:  # people's transcripts often are; no reason to bury them one by one
            self._metrics.skipped.labels("too_long").inc()
            log.debug("label left out", reason=str(error))
            return False
        new = self._model.add(pair)
        if not new:
            self._metrics.skipped.labels("repeated").inc()
        return new

    def _catch_up(self) -> None:
        """Fills a fresh folder with what the group has passed already, as far as the log still has it."""
        if self._model.labels_seen():
            return
        positions = {
            p.partition: at for p, at in self._bus.positions(self._group).items() if p.topic == TOPIC
        }
        for partition, bounds in sorted(self._bus.bounds(TOPIC).items()):
            offset, end = bounds.first, positions.get(partition, 0)
            while offset < end:
                records = self._bus.fetch(TOPIC, partition, offset, _BATCH)
                if not records:
                    break
                for record in records:
                    if record.offset < end and is_for(record, self._group):
                        self._store_or_skip(record)
                offset = records[-1].offset + 1

    def _store_or_skip(self, record: Record) -> None:
        try:
            self._store(record)
        except CharterError as error:  # it went to the dead letters when the group passed it
            log.debug("label left out", offset=record.offset, reason=str(error))
