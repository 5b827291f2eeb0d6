"""The loop of every worker: take a batch, do the work, publish the results and move the position as one act.

What happens to a message whose work fails is decided here and nowhere else:

    BackendUnavailable, Overloaded   a dependency is down or full: wait with backoff, for as long as it takes
    MalformedMessage, RequestError   trying again cannot help: to the dead letters at once
    ConfigError, BackendUnsupported,
    CheckpointError                  this worker is set up wrongly: it stops, the messages stay
    anything else                    tried `max_attempts` times, then to the dead letters

So one bad message never stops a partition, and one failing dependency buries no good message.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from charter.bus.base import (
    Bus,
    Consumer,
    ConsumerOptions,
    DeadLetter,
    Delivery,
    Outgoing,
    Partition,
    Record,
)
from charter.bus.messages import encode_dead_letter
from charter.bus.metrics import BusMetrics
from charter.errors import (
    BackendUnavailable,
    BackendUnsupported,
    CheckpointError,
    ConfigError,
    Fenced,
    MalformedMessage,
    Overloaded,
    RequestError,
)
from charter.telemetry.logs import get_logger

_log = get_logger(__name__)

_T = TypeVar("_T")

Handler = Callable[[Record], Awaitable[Sequence[Outgoing]]]
"""The work: a record in, messages out. Called for several records of a batch at once, but for records of one
key one after another."""

_TRANSIENT = (BackendUnavailable, Overloaded)
_HOPELESS = (MalformedMessage, RequestError)
_WRONG_SETUP = (ConfigError, BackendUnsupported, CheckpointError)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before trying again: doubling, with jitter, up to a bound."""

    initial_s: float = 0.2
    maximum_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.initial_s <= self.maximum_s:
            raise ConfigError(f"backoff needs 0 < initial_s <= maximum_s, not {self}")

    def delay(self, failures: int) -> float:
        """Seconds to wait after `failures` failures in a row (at least 1): 50 to 100 % of the bound."""
        bound = min(self.maximum_s, self.initial_s * 2.0 ** min(failures - 1, 30))
        return bound * (0.5 + 0.5 * random.random())


@dataclass(frozen=True, slots=True)
class Downstream:
    """A topic that this worker fills and a group that empties it; the worker waits while it is too full."""

    topic: str
    group: str
    max_lag: int
    """Records that the group may be behind before the worker takes no further batch."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works."""

    max_records: int = 16
    """Records of a batch, which are worked on at once and committed together."""
    max_attempts: int = 5
    """Attempts at a message before it goes to the dead letters."""
    delivery: Delivery = Delivery.EXACTLY_ONCE
    backoff: Backoff = Backoff()
    poll_timeout_s: float = 1.0
    """How long a poll waits for messages; also the longest that an idle worker takes to notice `stop`."""
    drain_s: float = 30.0
    """After `stop`, how long the records in hand may still take."""
    lag_interval_s: float = 5.0
    """Seconds between two looks at the lag, for metrics and for `downstream`."""
    room_interval_s: float = 0.25
    """Seconds between two looks whether a worker that is held back may go on."""
    downstream: tuple[Downstream, ...] = ()

    def __post_init__(self) -> None:
        if self.max_records < 1 or self.max_attempts < 1:
            raise ConfigError("max_records and max_attempts must be at least 1")


@dataclass(frozen=True, slots=True)
class _Done:
    publish: tuple[Outgoing, ...]


class _Stopped(Exception):  # noqa: N818 - not an error: the worker was told to stop while it waited
    pass


_Outcome = _Done | DeadLetter | None
"""Of one record: its results, its burial, or None for one that the worker did not get to (it was stopped)."""


class Worker:
    """Reads topics as a member of a group and gives each record to a handler."""

    def __init__(
        self,
        bus: Bus,
        group: str,
        topics: Sequence[str],
        handler: Handler,
        *,
        member: str | None = None,
        options: WorkerOptions | None = None,
        consumer_options: ConsumerOptions | None = None,
        metrics: BusMetrics | None = None,
        room: Callable[[], bool] | None = None,
    ) -> None:
        """Joins nothing yet; `run` does. While `room` says no, no batch is taken; it may ask the bus."""
        self.group = group
        self.topics = tuple(topics)
        self.options = options or WorkerOptions()
        self._bus = bus
        self._handler = handler
        self._member = member
        self._consumer_options = consumer_options
        self._metrics = metrics
        self._room = room
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """Takes no further batch; `run` returns when the records in hand are done.

        From any thread; safe to repeat.
        """
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(self._stopping.set)
        else:
            self._stopping.set()

    async def run(self) -> None:
        """Works until `stop`, or until it is cancelled.

        Raises `Fenced` when another process runs under this member's name, and whatever says that this
        worker is set up wrongly.
        """
        self._loop = asyncio.get_running_loop()
        try:
            consumer = await self._patiently(self._join)
        except _Stopped:
            return
        watcher = asyncio.create_task(self._watch_lag())
        try:
            while not self._stopping.is_set():
                await self._step(consumer)
        except _Stopped:
            _log.warning("stopped while the log was unavailable", group=self.group)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await asyncio.shield(asyncio.to_thread(consumer.close))

    async def _step(self, consumer: Consumer) -> None:
        await self._wait_for_room()
        if self._stopping.is_set():  # perhaps without room: nothing more is taken
            return
        records = await self._poll(consumer)
        if records and self.options.delivery is Delivery.EXACTLY_ONCE:
            await self._work_then_commit(consumer, records)
        elif records:
            await self._commit_then_work(consumer, records)

    def _join(self) -> Consumer:
        return self._bus.consumer(self.group, self.topics, self._member, self._consumer_options)

    async def _poll(self, consumer: Consumer) -> list[Record]:
        def poll() -> list[Record]:
            return consumer.poll(self.options.max_records, self.options.poll_timeout_s)

        started = time.perf_counter()
        records = await self._patiently(poll)
        self._observe_phase("poll", started)
        return records

    async def _work_then_commit(self, consumer: Consumer, records: list[Record]) -> None:
        outcomes = await self._work(records)
        records, outcomes = _finished(records, outcomes)
        if not records:
            return
        publish = [
            message for outcome in outcomes if isinstance(outcome, _Done) for message in outcome.publish
        ]
        letters = [outcome for outcome in outcomes if isinstance(outcome, DeadLetter)]
        started = time.perf_counter()
        try:
            await self._patiently(lambda: consumer.commit(records, publish, letters), self.options.drain_s)
        except Fenced as error:
            _log.warning("batch thrown away", group=self.group, reason=str(error))
            if self._metrics:
                self._metrics.fenced.labels(self.group).inc()
            return
        self._observe_phase("commit", started)
        self._observe_committed(records, outcomes, publish)

    async def _commit_then_work(self, consumer: Consumer, records: list[Record]) -> None:
        try:
            await self._patiently(lambda: consumer.commit(records), self.options.drain_s)
        except Fenced:
            return
        outcomes = await self._work(records)
        publish = [
            message for outcome in outcomes if isinstance(outcome, _Done) for message in outcome.publish
        ]
        letters = [encode_dead_letter(self.group, o) for o in outcomes if isinstance(o, DeadLetter)]
        if publish or letters:
            await self._patiently(lambda: self._bus.publish([*publish, *letters]), self.options.drain_s)
        self._observe_committed(records, outcomes, publish)

    async def _work(self, records: list[Record]) -> list[_Outcome]:
        """One outcome for each record; records of different keys are worked on at once."""
        started = time.perf_counter()
        chains: dict[tuple[Partition, bytes], list[int]] = {}
        for index, record in enumerate(records):
            chains.setdefault((record.source, record.key), []).append(index)
        outcomes: list[_Outcome] = [None] * len(records)

        async def follow(indices: list[int]) -> None:
            for index in indices:
                outcomes[index] = await self._settle(records[index])
                if outcomes[index] is None:
                    return

        tasks = [asyncio.create_task(follow(indices)) for indices in chains.values()]
        deadline: asyncio.Future[None] = asyncio.create_task(self._drained())
        everything: asyncio.Future[list[None]] = asyncio.gather(*tasks)
        both: list[asyncio.Future[Any]] = [everything, deadline]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if everything.done():
                everything.result()
        finally:
            for task in (*tasks, deadline):
                task.cancel()
            await asyncio.gather(*tasks, everything, deadline, return_exceptions=True)
        self._observe_phase("work", started)
        return outcomes

    async def _drained(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(self.options.drain_s)

    async def _settle(self, record: Record) -> _Outcome:
        """Works on one record until there is an outcome. Raises only what must stop the worker."""
        attempts = unavailable = 0
        while True:
            try:
                return _Done(tuple(await self._handler(record)))
            except _TRANSIENT as error:
                unavailable += 1
                self._on_retry(record, "unavailable", error, unavailable)
                delay = self.options.backoff.delay(unavailable)
            except _WRONG_SETUP:
                raise
            except _HOPELESS as error:
                return self._bury(record, error, attempts + 1)
            except Exception as error:
                attempts, unavailable = attempts + 1, 0
                if attempts >= self.options.max_attempts:
                    return self._bury(record, error, attempts)
                self._on_retry(record, "failed", error, attempts)
                delay = self.options.backoff.delay(attempts)
            if await self._stopped_within(delay):
                return None

    def _bury(self, record: Record, error: Exception, attempts: int) -> DeadLetter:
        reason = f"{type(error).__name__}: {error}"
        _log.error("message goes to the dead letters", **_where(record), attempts=attempts, error=reason)
        return DeadLetter(record, reason, attempts)

    def _on_retry(self, record: Record, kind: str, error: Exception, failures: int) -> None:
        reason = f"{type(error).__name__}: {error}"
        _log.warning("work failed and is tried again", **_where(record), failures=failures, error=reason)
        if self._metrics:
            self._metrics.retries.labels(self.group, record.topic, kind).inc()

    async def _patiently(self, call: Callable[[], _T], grace_s: float = 0.0) -> _T:
        """Runs a call of the bus in a thread, again and again while the log is unavailable.

        Raises `_Stopped` when it still is `grace_s` after the worker was stopped.
        """
        failures = 0
        give_up: float | None = None
        while True:
            try:
                return await asyncio.to_thread(call)
            except _TRANSIENT as error:
                failures += 1
                _log.warning("the log is unavailable", group=self.group, failures=failures, error=str(error))
            if await self._stopped_within(self.options.backoff.delay(failures)):
                give_up = give_up or time.monotonic() + grace_s
                if time.monotonic() >= give_up:
                    raise _Stopped
                await asyncio.sleep(self.options.backoff.initial_s)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True

    async def _wait_for_room(self) -> None:
        """Returns when every topic downstream has room."""
        while (self.options.downstream or self._room) and not self._stopping.is_set():
            full = await self._patiently(self._fullest)
            if self._metrics:
                self._metrics.held_back.labels(self.group).set(1 if full else 0)
            if not full:
                return
            await self._stopped_within(min(self.options.room_interval_s, self.options.lag_interval_s))

    def _fullest(self) -> bool:
        if self._room is not None and not self._room():
            return True
        return any(
            sum(lag.records for lag in self._bus.lag(stream.group, [stream.topic])) > stream.max_lag
            for stream in self.options.downstream
        )

    async def _watch_lag(self) -> None:
        while self._metrics is not None:
            try:
                self._metrics.observe_lag(await asyncio.to_thread(self._bus.lag, self.group, self.topics))
            except _TRANSIENT as error:
                _log.warning("the lag cannot be read", group=self.group, error=str(error))
            await asyncio.sleep(self.options.lag_interval_s)

    def _observe_phase(self, phase: str, started: float) -> None:
        if self._metrics:
            self._metrics.phase_seconds.labels(self.group, phase).observe(time.perf_counter() - started)

    def _observe_committed(
        self, records: list[Record], outcomes: list[_Outcome], publish: Sequence[Outgoing]
    ) -> None:
        if self._metrics:
            names = ["dead_letter" if isinstance(outcome, DeadLetter) else "done" for outcome in outcomes]
            self._metrics.observe_committed(self.group, records, names)
            for message in publish:
                self._metrics.published.labels(self.group, message.topic).inc()


def _finished(records: list[Record], outcomes: list[_Outcome]) -> tuple[list[Record], list[_Outcome]]:
    """What may be committed: in each partition, the records before the first that has no outcome."""
    blocked: set[Partition] = set()
    kept: list[tuple[Record, _Outcome]] = []
    for record, outcome in zip(records, outcomes, strict=True):
        if outcome is None:
            blocked.add(record.source)
        elif record.source not in blocked:
            kept.append((record, outcome))
    return [record for record, _ in kept], [outcome for _, outcome in kept]


def _where(record: Record) -> dict[str, object]:
    return {"topic": record.topic, "partition": record.partition, "offset": record.offset}
