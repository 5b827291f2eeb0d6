"""What a worker does with work that succeeds, fails, waits, or must not go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from charter.bus import Bus, Delivery, Outgoing, Record, TopicSpec
from charter.bus.dead_letters import buried
from charter.bus.metrics import BusMetrics
from charter.bus.sqlite import SqliteBus
from charter.bus.topics import load_topics
from charter.bus.worker import Backoff, Downstream, Worker, WorkerOptions
from charter.errors import BackendUnavailable, ConfigError, Fenced, MalformedMessage, Overloaded

QUICK = WorkerOptions(poll_timeout_s=0.05, backoff=Backoff(0.01, 0.02), drain_s=5.0, room_interval_s=0.01)


@pytest.fixture
def bus(tmp_path: Path):
    topics = [*load_topics(), TopicSpec("in", 2), TopicSpec("out", 2)]
    with SqliteBus(tmp_path / "bus.db", topics=topics) as bus:
        yield bus


def send(bus: Bus, *values: str) -> None:
    bus.publish([Outgoing("in", value.encode(), value.encode()) for value in values])


def results(bus: Bus) -> list[str]:
    return sorted((r.value or b"").decode() for p in bus.bounds("out") for r in bus.fetch("out", p, 0))


def done(bus: Bus, group: str = "g") -> bool:
    return all(lag.records == 0 for lag in bus.lag(group, ["in"]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(worker.run())
    yield task
    worker.stop()
    await task


async def echo(record: Record) -> list[Outgoing]:
    return [Outgoing("out", record.key, record.value)]


async def test_every_record_is_worked_on_and_its_results_published(bus: Bus) -> None:
    send(bus, *"abcdef")
    async with running(Worker(bus, "g", ["in"], echo, options=QUICK)):
        await until(lambda: done(bus))
    assert results(bus) == list("abcdef")


async def test_records_of_one_key_are_worked_on_one_after_another(bus: Bus) -> None:
    bus.publish([Outgoing("in", b"k", b"%d" % i) for i in range(5)])
    at_once: list[int] = []
    working = 0

    async def handle(record: Record) -> list[Outgoing]:
        nonlocal working
        working += 1
        at_once.append(working)
        await asyncio.sleep(0.005)
        working -= 1
        return []

    async with running(Worker(bus, "g", ["in"], handle, options=QUICK)):
        await until(lambda: done(bus))
    assert at_once == [1] * 5


async def test_a_dependency_that_is_down_is_waited_for_and_buries_nothing(bus: Bus) -> None:
    send(bus, "a")
    attempts = 0

    async def handle(record: Record) -> list[Outgoing]:
        nonlocal attempts
        attempts += 1
        if attempts <= 10:
            raise BackendUnavailable("judge is down") if attempts % 2 else Overloaded("judge is full")
        return await echo(record)

    async with running(Worker(bus, "g", ["in"], handle, options=QUICK)):
        await until(lambda: done(bus))
    assert results(bus) == ["a"]
    assert buried(bus) == []


async def test_work_that_keeps_failing_is_buried_and_the_others_go_on(bus: Bus) -> None:
    send(bus, "good", "bad", "fine")
    attempts = 0

    async def handle(record: Record) -> list[Outgoing]:
        nonlocal attempts
        if record.value == b"bad":
            attempts += 1
            raise ZeroDivisionError("of this message")
        return await echo(record)

    async with running(Worker(bus, "g", ["in"], handle, options=QUICK)):
        await until(lambda: done(bus))
    assert results(bus) == ["fine", "good"]
    (letter,) = buried(bus)
    assert (letter.topic, letter.group, letter.value, letter.attempts) == ("in", "g", b"bad", attempts)
    assert letter.attempts == QUICK.max_attempts
    assert letter.error == "ZeroDivisionError: of this message"


async def test_a_message_that_cannot_be_parsed_is_buried_at_once(bus: Bus) -> None:
    send(bus, "x")

    async def handle(record: Record) -> list[Outgoing]:
        raise MalformedMessage("not a RolloutEvent")

    async with running(Worker(bus, "g", ["in"], handle, options=QUICK)):
        await until(lambda: done(bus))
    assert [letter.attempts for letter in buried(bus)] == [1]


async def test_a_worker_that_is_set_up_wrongly_stops_and_leaves_the_messages(bus: Bus) -> None:
    send(bus, "x")

    async def handle(record: Record) -> list[Outgoing]:
        raise ConfigError("no such principle")

    with pytest.raises(ConfigError, match="no such principle"):
        await Worker(bus, "g", ["in"], handle, options=QUICK).run()
    assert not done(bus)
    assert buried(bus) == []


async def test_a_stop_finishes_what_is_in_hand_and_takes_no_more(bus: Bus) -> None:
    send(bus, *"abcd")
    options = WorkerOptions(max_records=1, poll_timeout_s=0.05, drain_s=5.0)
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def handle(record: Record) -> list[Outgoing]:
        started.set()
        await go_on.wait()
        return await echo(record)

    worker = Worker(bus, "g", ["in"], handle, options=options)
    async with running(worker):
        await started.wait()
        worker.stop()
        go_on.set()
    assert len(results(bus)) == 1


async def test_what_a_stopped_worker_did_not_finish_comes_again(bus: Bus) -> None:
    bus.publish([Outgoing("in", b"quick", b"quick"), Outgoing("in", b"endless", b"endless")])
    options = WorkerOptions(poll_timeout_s=0.05, drain_s=0.1)
    stuck = asyncio.Event()

    async def handle(record: Record) -> list[Outgoing]:
        if record.value == b"endless":
            stuck.set()
            await asyncio.Event().wait()
        return await echo(record)

    worker = Worker(bus, "g", ["in"], handle, options=options)
    async with running(worker):
        await stuck.wait()
    async with running(Worker(bus, "g", ["in"], echo, options=QUICK)):
        await until(lambda: done(bus))
    assert results(bus) == ["endless", "quick"]


async def test_at_most_once_moves_the_position_before_the_work(bus: Bus) -> None:
    send(bus, "a")
    positions_at_work: list[bool] = []

    async def handle(record: Record) -> list[Outgoing]:
        positions_at_work.append(await asyncio.to_thread(done, bus))
        return await echo(record)

    options = WorkerOptions(poll_timeout_s=0.05, delivery=Delivery.AT_MOST_ONCE)
    async with running(Worker(bus, "g", ["in"], handle, options=options)):
        await until(lambda: results(bus) == ["a"])
    assert positions_at_work == [True]


async def test_a_worker_waits_while_the_topic_downstream_is_full(bus: Bus) -> None:
    send(bus, *"abcdefgh")
    options = WorkerOptions(
        max_records=1, poll_timeout_s=0.05, room_interval_s=0.01, downstream=(Downstream("out", "next", 2),)
    )
    async with running(Worker(bus, "g", ["in"], echo, options=options)):
        await until(lambda: len(results(bus)) == 3)
        await asyncio.sleep(0.2)
        assert len(results(bus)) == 3
        with bus.consumer("next", ["out"]) as reader:
            async with asyncio.timeout(20):
                while not done(bus):
                    reader.commit(await asyncio.to_thread(reader.poll, 10, 0.1))
    assert results(bus) == list("abcdefgh")


async def test_a_second_process_under_the_same_name_stops_the_first(bus: Bus, tmp_path: Path) -> None:
    with SqliteBus(tmp_path / "bus.db", topics=[]) as elsewhere:
        first = asyncio.create_task(Worker(bus, "g", ["in"], echo, member="w", options=QUICK).run())
        await until(lambda: bool(bus._consumers and bus._consumers[0].assignment()))  # type: ignore[attr-defined]
        async with running(Worker(elsewhere, "g", ["in"], echo, member="w", options=QUICK)):
            with pytest.raises(Fenced, match="'w'"):
                await first


async def test_metrics_count_outcomes_lag_and_time_in_the_bus(bus: Bus) -> None:
    send(bus, "good", "bad")

    async def handle(record: Record) -> list[Outgoing]:
        if record.value == b"bad":
            raise MalformedMessage("bad")
        return await echo(record)

    registry = CollectorRegistry()
    options = WorkerOptions(poll_timeout_s=0.05, lag_interval_s=0.05)
    metrics = BusMetrics.of(registry)
    async with running(Worker(bus, "g", ["in"], handle, options=options, metrics=metrics)):
        await until(lambda: done(bus))
        await asyncio.sleep(0.2)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("charter_bus_records_total", group="g", topic="in", outcome="done") == 1
    assert value("charter_bus_records_total", group="g", topic="in", outcome="dead_letter") == 1
    assert value("charter_bus_published_total", group="g", topic="out") == 1
    assert value("charter_bus_age_seconds_count", group="g", topic="in") == 2
    assert value("charter_bus_lag_records", group="g", topic="in", partition="0") == 0
    assert value("charter_bus_oldest_seconds", group="g", topic="in") == 0
    assert (value("charter_bus_phase_seconds_count", group="g", phase="commit") or 0) >= 1
